/* Collectives in rounds over four slots of each rank, with one round of lookahead and one crash anywhere: nobody reads
   a slot of another round than it waits for, nobody stays asleep, and every survivor of a crash ends with its culprit
   unless the victim had published all that it owed. */
#ifndef COLLECTIVES
#define COLLECTIVES 3
#endif
#define ROUNDS(collective) (1 + (collective) % 3)    /* 1, 2, 3, 1, 2, 3, ... */

#ifdef BUG_SLOTS
#define SLOTS 3
#else
#define SLOTS 4
#endif
#define SLOT(rank, round) ((rank) * SLOTS + (round) % SLOTS)

#define ARRIVED(rank) (seq[SLOT(rank, waited)] == waited)
#define AWAITS(peer) (!ARRIVED(peer))
#if N == 2
#define READY (ARRIVED(0) && ARRIVED(1))
#elif N == 3
#define READY (ARRIVED(0) && ARRIVED(1) && ARRIVED(2))
#else
#define READY (ARRIVED(0) && ARRIVED(1) && ARRIVED(2) && ARRIVED(3))
#endif

#include "group.pml"

#define TORN 255
byte seq[N * SLOTS], payload[N * SLOTS];   /* the number of a round */
byte buffer[N];                            /* of the user, read in place by the peers: the number of its collective */

#ifdef COARSE
inline publish() {
  opened++;
  d_step { payload[SLOT(me, opened)] = opened; seq[SLOT(me, opened)] = opened };
  ring_peers()
}
#else
inline publish() {
  opened++;
#ifdef BUG_ORDER
  seq[SLOT(me, opened)] = opened;
#endif
  payload[SLOT(me, opened)] = opened;
#ifdef BUG_RING_FIRST
  ring_peers();
#endif
#ifndef BUG_ORDER
  seq[SLOT(me, opened)] = opened;
#endif
#if !defined(BUG_RING_FIRST) && !defined(BUG_NO_RING)
  ring_peers()
#endif
}
#endif

inline read_slot(peer) {
  assert(seq[SLOT(peer, waited)] == waited && payload[SLOT(peer, waited)] == waited
#ifdef IN_PLACE
         && buffer[peer] == collective
#endif
  )
}

inline read() {
#ifdef COARSE
  d_step { for (i : 1 .. N - 1) { read_slot(PEER(i)) }; i = 0 }
#else
  for (i : 1 .. N - 1) { read_slot(PEER(i)) }
#endif
}

proctype caller(byte me) {
  byte collective, opened, waited, last, i, fault;
  bit failed;
  {
    do
    :: collective < COLLECTIVES ->
      last = opened + ROUNDS(collective);
#ifdef IN_PLACE
      buffer[me] = collective;
#endif
      publish();
      do
      :: waited == last -> break
      :: else ->
#ifdef BUG_DEEP
        do :: opened < last && opened < waited + 3 -> publish() :: else -> break od;
#else
        if :: opened < last -> publish() :: else fi;
#endif
        waited++;
        await();
        if :: failed -> goto gone :: else fi;
        read()
      od;
#if defined(IN_PLACE) && !defined(BUG_NO_ACK)
      publish();
      waited++;
      await();
      if :: failed -> goto gone :: else fi;
#endif
#ifdef IN_PLACE
      buffer[me] = TORN;
#endif
      collective++
    :: else -> break
    od;
gone:
    if
    :: failed ->
      assert(text[poison_reporter] == poison_fault);
      assert(poison_fault == FAULT(DIED, crashed))
    :: else -> assert(waited == opened && collective == COLLECTIVES)
    fi;
    leave()
  } unless { crashed == me };
  d_step { collective = 0; opened = 0; waited = 0; last = 0; i = 0; fault = 0; failed = 0 }
}

init {
  byte i;
  start()
}
