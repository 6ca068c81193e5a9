/* The verdict of a group whose ranks may give what the others wait for, leave before or after it, abort, and, one of
   them, die anywhere: one fault wins, it is true, all who fail report it with its text, and nobody sleeps on. */
#define AWAITS(peer) (peer != me && !given[peer])
#if N == 2
#define READY (!AWAITS(0) && !AWAITS(1))
#elif N == 3
#define READY (!AWAITS(0) && !AWAITS(1) && !AWAITS(2))
#else
#define READY (!AWAITS(0) && !AWAITS(1) && !AWAITS(2) && !AWAITS(3))
#endif
#include "group.pml"

bit given[N];
bit leaves[N], aborts[N];   /* decided at the start */
byte verdict;               /* of the first rank that failed */

inline give() {
  given[me] = 1;
  ring_peers()
}

inline check_verdict() {
  d_step {
    assert(verdict == 0 || verdict == poison_fault);
    assert(text[poison_reporter] == poison_fault);
    verdict = poison_fault;
    i = (verdict - 1) % N;
    assert(i == crashed || (leaves[i] && verdict == FAULT(LEFT, i)) || (aborts[i] && verdict == FAULT(FAILED, i)));
    i = 0
  }
}

proctype caller(byte me) {
  byte i, fault;
  bit failed;
#ifdef BUG_LEFT_ORDER
  byte suspect;
#endif
  {
    if
    :: give(); await()            /* a collective */
    :: give()                     /* a send that fits the ring, and nothing after it */
    :: leaves[me] = 1
    :: aborts[me] = 1; declare(FAULT(FAILED, me)); failed = 1
    fi;
    if :: failed -> check_verdict() :: else fi;
    leave()
  } unless { crashed == me };
  d_step { i = 0; fault = 0; failed = 0 }
}

init {
  byte i;
  start()
}
