/* The credit ring of an ordered pair, with one crash anywhere. Each rank sends MESSAGES to the next rank and takes as
   many from the one before it (two ranks: both directions at once), all in one wait, as progress() does. Pieces arrive
   once, whole and in order; a survivor ends with the culprit, or with everything where its peers had sent all of it. */
#ifndef MESSAGES
#define MESSAGES 3
#endif
#define PIECES(message) (1 + (message) % 3)   /* 1, 2, 3 */
#ifndef SLOTS
#define SLOTS 2
#endif
#define NEXT ((me + 1) % N)
#define BEFORE ((me + N - 1) % N)
#define SLOT(sender, piece) ((sender) * SLOTS + (piece) % SLOTS)

#ifdef BUG_CREDIT
#define CREDIT (sent < consumed[me] + SLOTS + 1)
#else
#define CREDIT (sent < consumed[me] + SLOTS)
#endif
#define CAN_SEND (sending < messages && CREDIT)
#define CAN_TAKE (taking < MESSAGES && seq[SLOT(BEFORE, taken)] == taken + 1)
#define DONE (sending == messages && taking == MESSAGES)

#define READY (CAN_SEND || CAN_TAKE)
/* The wait depends on the receiver while there is something to send, and on the sender while something is missing. */
#define AWAITS(peer) ((peer == NEXT && sending < messages && !CREDIT) || \
                      (peer == BEFORE && taking < MESSAGES && seq[SLOT(BEFORE, taken)] != taken + 1))
#include "group.pml"

/* By the sender: its ring, and what the receiver gave back. A piece is its message and its place in it. */
byte seq[N * SLOTS], message[N * SLOTS], place[N * SLOTS];
byte consumed[N];

inline push() {
#ifdef BUG_ORDER
  seq[SLOT(me, sent)] = sent + 1;
  d_step { message[SLOT(me, sent)] = sending; place[SLOT(me, sent)] = out };
#else
  d_step { message[SLOT(me, sent)] = sending; place[SLOT(me, sent)] = out };
  seq[SLOT(me, sent)] = sent + 1;
#endif
  d_step {
    sent++;
    if :: out + 1 == PIECES(sending) -> out = 0; sending++ :: else -> out++ fi
  };
#ifndef BUG_NO_RING
  ring(NEXT)
#endif
}

inline pull() {
#ifdef BUG_EARLY_CREDIT
  consumed[BEFORE] = taken + 1;
#endif
  assert(message[SLOT(BEFORE, taken)] == taking && place[SLOT(BEFORE, taken)] == in);
  consumed[BEFORE] = taken + 1;
  d_step {
    taken++;
    if :: in + 1 == PIECES(taking) -> in = 0; taking++ :: else -> in++ fi
  };
#ifndef BUG_NO_CREDIT_RING
  ring(BEFORE)
#endif
}

proctype caller(byte me) {
  byte messages = MESSAGES, sent, sending, out, taken, taking, in, i, fault;
  bit failed;
  {
#ifdef SHORT
    if :: me == 0 -> messages = MESSAGES - 1 :: else fi;
#endif
    do
    :: DONE -> break
    :: CAN_SEND -> push()
    :: !CAN_SEND && CAN_TAKE -> pull()
    :: else ->
      await();
      if :: failed -> break :: else fi
    od;
    if
    :: failed ->
      assert(text[poison_reporter] == poison_fault);
#ifdef SHORT
      assert(poison_fault == FAULT(DIED, crashed) || poison_fault == FAULT(LEFT, 0))
#else
      assert(poison_fault == FAULT(DIED, crashed))
#endif
    :: else
#ifdef SHORT
      -> assert(me == 0)
#endif
    fi;
    leave()
  } unless { crashed == me };
  d_step { messages = 0; sent = 0; sending = 0; out = 0; taken = 0; taking = 0; in = 0; i = 0; fault = 0; failed = 0 }
}

init {
  byte i;
  start()
}
