/* What every protocol of the shared segment stands on: doorbell and sleepers, poison word, lease, clean leave, crash.
   One statement is one access to shared memory, in a sequentially consistent order. N is the number of ranks. COARSE
   joins steps, for more ranks than the finer ones allow; SPIN (with COARSE) lets nobody sleep, for more rounds.

   Whoever includes this defines READY, the predicate of a wait, and AWAITS(peer), whether it still depends on a peer.
   Nobody is woken by the passing of time unless SLICE is defined: the 20 ms slices of the transport would hide a lost
   wake-up. */
#define NOBODY N
#define PEER(step) ((me + (step)) % N)

/* All that a futex compares is whether the counter changed since its owner loaded it. */
#define UNLOADED 0
#define LOADED 1
#define CHANGED 2
byte doorbell[N];
bit sleepers[N];                    /* the owner sleeps on its doorbell, or is about to */
bit asleep[N];                      /* in the kernel's queue of the futex */

byte crashed = NOBODY;
bit lost[N];                        /* the lease ended, by a death or after a clean leave */
bit closed[N];
#define DEAD(peer) (lost[peer] && !closed[peer])

#define DIED 0
#define LEFT 1
#define FAILED 2
#define FAULT(code, culprit) (1 + (code) * N + (culprit))
byte poison_fault, poison_reporter; /* one word in the segment */
byte text[N];                       /* of the fault, in the control block of its reporter */
bit writer[N];                      /* the mutex of a rank's threads for their text */

/* ---- doorbell */

inline ring(rank) {
#ifdef SPIN
  skip
#elif defined(COARSE)
  d_step { bump(rank); wake(rank) }
#else
#ifdef BUG_WAKE_FIRST
  d_step { wake(rank) };
#endif
#ifndef BUG_NO_BUMP
  d_step { bump(rank) };
#endif
#ifndef BUG_WAKE_FIRST
  d_step { wake(rank) }
#endif
#endif
}

inline bump(rank) {
  doorbell[rank] = (doorbell[rank] == LOADED -> CHANGED : doorbell[rank])
}

inline wake(rank) {
  asleep[rank] = asleep[rank] && !sleepers[rank]
}

inline ring_peers() {
#ifdef SPIN
  skip
#elif defined(COARSE) && N > 3
  d_step { for (i : 1 .. N - 1) { bump(PEER(i)); wake(PEER(i)) }; i = 0 }
#else
  for (i : 1 .. N - 1) {
    ring(PEER(i))
  }
#endif
}

inline awake() {
  d_step { doorbell[me] = UNLOADED; sleepers[me] = 0 }
}

#ifdef BUG_LEFT_ORDER
#define HAS_LEFT(peer) (closed[peer] && peer == suspect)
#else
#define HAS_LEFT(peer) (closed[peer] && AWAITS(peer))
#endif
#if N == 2
#define ANY_PEER(is) is(PEER(1))
#elif N == 3
#define ANY_PEER(is) (is(PEER(1)) || is(PEER(2)))
#else
#define ANY_PEER(is) (is(PEER(1)) || is(PEER(2)) || is(PEER(3)))
#endif

/* ---- the wait; ends with failed = 1 where a fault ended it */

#ifdef SPIN
inline await() {
  atomic {
    if
    :: READY
    :: poison_fault != 0 -> failed = 1
    :: ANY_PEER(DEAD) || ANY_PEER(HAS_LEFT) -> look(); declare(fault); failed = 1
    fi
  }
}
#elif defined(COARSE)
inline await() {
  do
  :: READY -> break
  :: else ->
    d_step { doorbell[me] = LOADED; sleepers[me] = 1 };
    atomic {
      if
      :: READY -> awake(); break
      :: !READY && poison_fault != 0 -> awake(); failed = 1; break
      :: !READY && poison_fault == 0 ->
        look();
        if :: fault != 0 -> declare(fault); awake(); failed = 1; break :: else fi
      fi
    };
    fall_asleep();
    sleepers[me] = 0
  od
}
#else
inline await() {
  do
  :: READY -> break
  :: else ->
#ifdef BUG_SEEN_LATE
    sleepers[me] = 1;
    if :: READY -> awake(); break :: else fi;
    doorbell[me] = LOADED;
#else
    doorbell[me] = LOADED;
    sleepers[me] = 1;
#ifndef BUG_SLEEP
    if :: READY -> awake(); break :: else fi;
#endif
#endif
    if :: poison_fault != 0 -> awake(); failed = 1; break :: else fi;
    look();
    if
    :: fault != 0 && READY -> awake(); break
    :: fault != 0 && !READY -> declare(fault); awake(); failed = 1; break
    :: fault == 0
    fi;
    fall_asleep();
    sleepers[me] = 0
  od
}
#endif

inline fall_asleep() {
  d_step { if :: doorbell[me] == LOADED -> asleep[me] = 1 :: else fi; doorbell[me] = UNLOADED };
#ifdef SLICE
  if :: !asleep[me] :: poison_fault != 0 || ANY_PEER(HAS_LEFT) -> asleep[me] = 0 fi
#else
  !asleep[me]
#endif
}

/* Any one of the faults that this rank can see. Each flag only rises and is read in the order that makes one step of
   it the same: the lease before `closed`, `closed` before what the wait depends on. */
inline look() {
#ifdef BUG_LEFT_ORDER
  d_step {
    suspect = NOBODY;
    for (i : 1 .. N - 1) { if :: AWAITS(PEER(i)) -> suspect = PEER(i) :: else fi };
    i = 0
  };
#endif
  if
  :: DEAD(PEER(1)) -> fault = FAULT(DIED, PEER(1))
  :: HAS_LEFT(PEER(1)) -> fault = FAULT(LEFT, PEER(1))
#if N > 2
  :: DEAD(PEER(2)) -> fault = FAULT(DIED, PEER(2))
  :: HAS_LEFT(PEER(2)) -> fault = FAULT(LEFT, PEER(2))
#endif
#if N > 3
  :: DEAD(PEER(3)) -> fault = FAULT(DIED, PEER(3))
  :: HAS_LEFT(PEER(3)) -> fault = FAULT(LEFT, PEER(3))
#endif
  :: else -> fault = 0
  fi
}

/* ---- poison: the fault of this rank wins, or another one has */

#ifdef COARSE
inline declare(fault) {
  d_step {
    if
    :: poison_fault == 0 ->
      text[me] = fault;
      poison_fault = fault;
      poison_reporter = me;
      for (i : 0 .. N - 1) { bump(i); wake(i) }
      i = 0
    :: else
    fi
  }
}
#else
inline declare(fault) {
#ifndef BUG_WRITER
  atomic { !writer[me] -> writer[me] = 1 };
#endif
  if
  :: poison_fault == 0 ->
#ifdef BUG_TEXT
    raise(fault);
    text[me] = fault;
#else
    text[me] = fault;
    raise(fault);
#endif
#ifndef BUG_NO_ALARM
    ring_peers();
    ring(me);
#endif
  :: else
  fi;
  writer[me] = 0
}
#endif

inline raise(fault) {
#ifdef BUG_CAS
  d_step { poison_fault = fault; poison_reporter = me };
#else
  d_step { if :: poison_fault == 0 -> poison_fault = fault; poison_reporter = me :: else fi };
#endif
}

/* ---- the end of a rank */

inline leave() {
#ifdef COARSE
  d_step { closed[me] = 1; lost[me] = 1; for (i : 1 .. N - 1) { bump(PEER(i)); wake(PEER(i)) }; i = 0 }
#else
#ifdef BUG_CLOSE
  lost[me] = 1;
#endif
  closed[me] = 1;
  ring_peers();
  lost[me] = 1
#endif
}

/* The keeper thread of a rank: turns a death into poison, until its rank has left. */
#ifdef BUG_DEATH_ORDER
#define FIND(peer) !closed[peer] -> if :: lost[peer] -> declare(FAULT(DIED, peer)) :: else fi
#else
#define FIND(peer) DEAD(peer) -> declare(FAULT(DIED, peer))
#endif

proctype keeper(byte me) {
  byte i;
  {
    do
    :: closed[me] -> break
#ifndef BUG_NO_WATCH
    :: poison_fault == 0 && FIND(PEER(1))
#if N > 2
    :: poison_fault == 0 && FIND(PEER(2))
#endif
#if N > 3
    :: poison_fault == 0 && FIND(PEER(3))
#endif
#endif
    od
  } unless { crashed == me }
}

/* Whichever keeper comes first, here that of rank 1: what the others then do changes nothing. */
proctype first_keeper() {
  byte i, me = 1;
end:
  DEAD(0) -> declare(FAULT(DIED, 0))
}

/* All ranks do the same up to a rotation, so that whoever dies may be called rank 0. That nobody dies is decided too: a
   death still to come would wake those who sleep for ever. What nobody reads of a dead rank is forgotten with it, for
   fewer states. */
proctype crash() {
  if
  :: true
  :: d_step { crashed = 0; lost[0] = 1; doorbell[0] = UNLOADED; sleepers[0] = 0; asleep[0] = 0; writer[0] = 0 }
  fi
}

inline start() {
  atomic {
#ifdef COARSE
    run first_keeper();
#endif
    for (i : 0 .. N - 1) {
      run caller(i);
#ifndef COARSE
      run keeper(i)
#endif
    }
#ifndef NO_CRASH
    run crash()
#endif
  }
}
