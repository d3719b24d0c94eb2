/* Every interruption moves an epoch forward; a call is interrupted when the epoch is no longer the one it began
 * in. That needs no reset, so an interruption cannot leak into the next call.
 *
 * SIGINT's handler is ours only while a call runs: an interpreter sets its own handler around every chunk, and one
 * installed earlier would be lost. */
#include "interrupt.h"

#include <pthread.h>
#include <signal.h>
#include <stdatomic.h>

static atomic_uint epoch;
static atomic_bool catching;

/* Guarded by the mutex; the handler reads previous only while it is installed, when nobody writes it. */
static pthread_mutex_t mutex = PTHREAD_MUTEX_INITIALIZER;
static int running;
static bool installed;
static atomic_bool spent; /* has a SIGINT taken the handler away again? */
static struct sigaction previous;

void cuflash_interrupt(void) {
    atomic_fetch_add(&epoch, 1);
}

bool cuflash_catch_sigint(bool on) {
    return atomic_exchange(&catching, on);
}

static void on_sigint(int signal_number) {
    cuflash_interrupt();
    atomic_store(&spent, true);
    sigaction(signal_number, &previous, NULL); /* a second Ctrl-C is not ours */
}

static bool install(void) {
    struct sigaction ours = {.sa_handler = on_sigint, .sa_flags = SA_RESTART};
    sigemptyset(&ours.sa_mask);
    atomic_store(&spent, false);
    return sigaction(SIGINT, &ours, NULL) == 0;
}

unsigned cuflash_interruptible_begin(void) {
    unsigned ticket = atomic_load(&epoch);
    pthread_mutex_lock(&mutex);
    running++;
    /* One that is ignored, as in a background job, stays so. */
    if (atomic_load(&catching) && !installed)
        installed = sigaction(SIGINT, NULL, &previous) == 0 && previous.sa_handler != SIG_IGN && install();
    else if (installed && atomic_exchange(&spent, false))
        install();
    pthread_mutex_unlock(&mutex);
    return ticket;
}

static void uninstall(void) {
    struct sigaction current;
    if (sigaction(SIGINT, NULL, &current) == 0 && current.sa_handler == on_sigint) sigaction(SIGINT, &previous, NULL);
    installed = false;
}

void cuflash_interruptible_end(void) {
    pthread_mutex_lock(&mutex);
    if (--running == 0 && installed) uninstall();
    pthread_mutex_unlock(&mutex);
}

bool cuflash_interrupted(unsigned ticket) {
    return atomic_load_explicit(&epoch, memory_order_relaxed) != ticket;
}

/* ---- Fork --------------------------------------------------------------------------------------- */

/* Calls of other threads are not in a child. */
static void before_fork(void) {
    pthread_mutex_lock(&mutex);
}
static void in_parent(void) {
    pthread_mutex_unlock(&mutex);
}
static void in_child(void) {
    running = 0;
    if (installed) uninstall();
    pthread_mutex_unlock(&mutex);
}

__attribute__((constructor)) static void watch_for_forks(void) {
    pthread_atfork(before_fork, in_parent, in_child);
}
