/* Starting threads; see thread.h. */
#include "tiers/host/thread.h"

#include "proto/errors.h"

#include <signal.h>

int kvt_thread_start(const char *name, void *(*run)(void *), void *argument, pthread_t *out) {
    sigset_t all;
    sigset_t before;
    pthread_t thread;
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before);
    int rc = pthread_create(&thread, NULL, run, argument);
    pthread_sigmask(SIG_SETMASK, &before, NULL);
    if (rc != 0) {
        return -KVT_ESYS;
    }
    (void)pthread_setname_np(thread, name);
    *out = thread;
    return 0;
}
