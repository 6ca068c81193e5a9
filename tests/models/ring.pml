/* The credit ring of an ordered pair, with one crash anywhere. Each rank sends MESSAGES to the next rank and takes as
   many from the one before it (two ranks: both directions at once), all in one wait, as progress() does. Pieces arrive
   once, whole and in order; a survivor ends with the culprit, or with everything where its peers had sent all of it.
   With PUT a receive may show where its buffer is, and the sender puts the message there as one piece. */
#ifndef MESSAGES
#define MESSAGES 3
#endif
#define PIECES(message) (1 + (message) % 3)   /* 1, 2, 3 */
#ifndef SLOTS
#define SLOTS 2
#endif
#ifndef LANDINGS
#define LANDINGS 1
#endif
#define LANDING(sender, message) ((sender) * LANDINGS + (message) % LANDINGS)
#define NEXT ((me + 1) % N)
#define BEFORE ((me + N - 1) % N)
#define SLOT(sender, piece) ((sender) * SLOTS + (piece) % SLOTS)

#ifdef BUG_CREDIT
#define CREDIT (sent < consumed[me] + SLOTS + 1)
#else
#define CREDIT (sent < consumed[me] + SLOTS)
#endif
#ifdef PUT
#define WHOLE(slot) whole[slot]
#else
#define WHOLE(slot) false
#endif
#define LAST(piece, message, all) (all || piece + 1 == PIECES(message))
#ifdef PUT
#define LONG (PIECES(sending) > SLOTS)   /* waits for its receive */
#define CAN_SEND (sending < messages && CREDIT && (!LONG || recvs[me] > sending))
#else
#define CAN_SEND (sending < messages && CREDIT)
#endif
#ifdef PUT
#define POSTED (posted > taking)
#define CAN_POST (posted < MESSAGES && posted <= taking + LANDINGS)   /* one more than is shown */
#ifdef BUG_LANDING
#define CAN_SHOW (posted <= taking + LANDINGS)
#else
#define CAN_SHOW (posted < taking + LANDINGS)
#endif
#else
#define POSTED true
#define CAN_POST false
#endif
#define CAN_TAKE (taking < MESSAGES && POSTED && seq[SLOT(BEFORE, taken)] == taken + 1)
#define DONE (sending == messages && taking == MESSAGES)

#define READY (CAN_SEND || CAN_TAKE)
/* The wait depends on the receiver while there is something to send, and on the sender while something is missing. */
#define AWAITS(peer) ((peer == NEXT && sending < messages && !CAN_SEND) || \
                      (peer == BEFORE && taking < MESSAGES && seq[SLOT(BEFORE, taken)] != taken + 1))
#include "group.pml"

/* By the sender: its ring, and what the receiver gave back. A piece is its message and its place in it. */
byte seq[N * SLOTS], message[N * SLOTS], place[N * SLOTS];
byte consumed[N];
#ifdef PUT
/* By the sender: what the receiver showed, and the buffers of its receives. */
byte shown[N * LANDINGS], spot[N * LANDINGS], buffer[N * MESSAGES];
bit whole[N * SLOTS];
byte recvs[N];   /* posted */

inline post() {
  if
  :: CAN_SHOW ->
#ifdef BUG_SHOWN_FIRST
    shown[LANDING(BEFORE, posted)] = posted + 1;
    spot[LANDING(BEFORE, posted)] = posted
#else
    spot[LANDING(BEFORE, posted)] = posted;
    shown[LANDING(BEFORE, posted)] = posted + 1
#endif
  :: true   /* its buffer lies elsewhere */
  fi;
  posted++;
  recvs[BEFORE] = posted;
#ifndef BUG_NO_POST_RING
  if :: PIECES(posted - 1) > SLOTS -> ring(BEFORE) :: else fi
#endif
}

inline put() {
  if
  :: out == 0 && shown[LANDING(me, sending)] == sending + 1 ->
    buffer[me * MESSAGES + spot[LANDING(me, sending)]] = sending + 1;
    whole[SLOT(me, sent)] = 1
  :: else -> whole[SLOT(me, sent)] = 0
  fi
}
#endif

inline push() {
#ifdef PUT
  put();
#endif
#ifdef BUG_ORDER
  seq[SLOT(me, sent)] = sent + 1;
  d_step { message[SLOT(me, sent)] = sending; place[SLOT(me, sent)] = out };
#else
  d_step { message[SLOT(me, sent)] = sending; place[SLOT(me, sent)] = out };
  seq[SLOT(me, sent)] = sent + 1;
#endif
  d_step {
    sent++;
    if :: LAST(out, sending, WHOLE(SLOT(me, sent - 1))) -> out = 0; sending++ :: else -> out++ fi
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
#ifdef PUT
  assert(!whole[SLOT(BEFORE, taken)] || buffer[BEFORE * MESSAGES + taking] == taking + 1);
#endif
  d_step {
    if :: LAST(in, taking, WHOLE(SLOT(BEFORE, taken))) -> in = 0; taking++ :: else -> in++ fi;
    taken++
  };
  consumed[BEFORE] = taken;
#ifndef BUG_NO_CREDIT_RING
  ring(BEFORE)
#endif
}

proctype caller(byte me) {
  byte messages = MESSAGES, sent, sending, out, posted, taken, taking, in, i, fault;
  bit failed;
  {
#ifdef SHORT
    if :: me == 0 -> messages = MESSAGES - 1 :: else fi;
#endif
    do
    :: DONE -> break
    :: CAN_SEND -> push()
    :: !CAN_SEND && CAN_TAKE -> pull()
#ifdef PUT
    :: CAN_POST -> post()
#endif
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
  d_step { messages = 0; sent = 0; sending = 0; out = 0; posted = 0; taken = 0; taking = 0; in = 0; i = 0; fault = 0; failed = 0 }
}

init {
  byte i;
  start()
}
