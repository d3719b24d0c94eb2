/* Stopping long calls: from another thread, and by SIGINT where that was asked for. Every call here would run for
 * minutes if it could not be stopped; a test that fails to stop one runs into its time limit. */
#include <pthread.h>
#include <signal.h>
#include <stdatomic.h>
#include <time.h>
#include <unistd.h>

#include "check.h"

enum {
    SOON_MS = 5000,   /* far below the minutes, far above what slow machines and sanitizers add */
    AT_WORK_MS = 100, /* far above what a call checks first */
};

static double clock_ms(clockid_t clock) {
    struct timespec t = {0};
    clock_gettime(clock, &t);
    return (double)t.tv_sec * 1e3 + (double)t.tv_nsec / 1e6;
}

static double now_ms(void) {
    return clock_ms(CLOCK_MONOTONIC);
}

static void sleep_ms(int ms) {
    nanosleep(&(struct timespec){ms / 1000, ms % 1000 * 1000000L}, NULL);
}

/* A problem whose tensors are small beside its work: all rows of q are one row, repeated by a stride of 0. */
typedef struct {
    cuflash_tensor row, q, k, v, o, d_o, dk;
    cuflash_attention a;
} problem;

static problem big, small; /* one that takes minutes, one that takes no time */

static void make(problem *p, int64_t seq_q, int64_t seq_k) {
    const int64_t row[] = {1, 1, 1, 16}, q[] = {1, 1, seq_q, 16}, k[] = {1, 1, seq_k, 16}, o[] = {1, 1, seq_q, 1};
    cuflash_generator g = {.seed = 1};
    REQUIRE_OK(cuflash_tensor_empty(&p->row, CUFLASH_FLOAT32, CUFLASH_CPU, 4, row));
    REQUIRE_OK(cuflash_random_normal(&p->row, &g, 0, 1));
    REQUIRE_OK(cuflash_tensor_expand(&p->q, &p->row, 4, q));
    REQUIRE_OK(cuflash_tensor_narrow(&p->d_o, &p->row, 3, 0, 1));
    REQUIRE_OK(cuflash_tensor_expand(&p->d_o, &p->d_o, 4, o));
    REQUIRE_OK(cuflash_tensor_empty(&p->k, CUFLASH_FLOAT32, CUFLASH_CPU, 4, k));
    REQUIRE_OK(cuflash_random_normal(&p->k, &g, 0, 1));
    REQUIRE_OK(cuflash_tensor_narrow(&p->v, &p->k, 3, 0, 1));
    REQUIRE_OK(cuflash_tensor_empty(&p->dk, CUFLASH_FLOAT32, CUFLASH_CPU, 4, k));
    REQUIRE_OK(cuflash_tensor_empty(&p->o, CUFLASH_FLOAT32, CUFLASH_CPU, 4, o));
    REQUIRE_OK(cuflash_tensor_fill(&p->o, 0));
    p->a = (cuflash_attention){
        .struct_size = sizeof p->a, .q = &p->q, .k = &p->k, .v = &p->v, .o = &p->o, .d_o = &p->d_o, .dk = &p->dk};
}

static void release(problem *p) {
    cuflash_tensor *all[] = {&p->row, &p->q, &p->k, &p->v, &p->o, &p->d_o, &p->dk};
    for (int i = 0; i < COUNT_OF(all); i++) cuflash_tensor_release(all[i]);
}

static const struct {
    const char *name;
    cuflash_status (*call)(const cuflash_attention *);
} CALLS[] = {{"attention_forward", cuflash_attention_forward},
             {"attention_backward", cuflash_attention_backward},
             {"reference_forward", cuflash_reference_forward},
             {"reference_backward", cuflash_reference_backward}};

/* A long call in a thread of its own. */
typedef struct {
    int which;
    cuflash_status status;
    char message[512];
    double ended;
    atomic_bool done;
    pthread_t thread;
} runner;

static void *run(void *context) {
    runner *r = context;
    r->status = CALLS[r->which].call(&big.a);
    r->ended = now_ms();
    snprintf(r->message, sizeof r->message, "%s", cuflash_last_error());
    atomic_store(&r->done, true);
    return NULL;
}

/* What a thread has had of a core; 0 where it has ended. */
static double worked_ms(pthread_t thread) {
    clockid_t clock;
    return pthread_getcpuclockid(thread, &clock) == 0 ? clock_ms(clock) : 0;
}

/* Returns when the call has begun, as it has after some time of its own, however busy the machine is. */
static void start(runner *r, int which) {
    r->which = which;
    atomic_init(&r->done, false);
    CHECK(pthread_create(&r->thread, NULL, run, r) == 0);
    while (worked_ms(r->thread) < AT_WORK_MS && !atomic_load(&r->done)) sleep_ms(10);
    CHECK_F(!atomic_load(&r->done), "%s ended by itself", CALLS[which].name);
}

static void check_stops(runner *r, double told) {
    pthread_join(r->thread, NULL);
    CHECK_F(r->status == CUFLASH_INTERRUPTED, "expected INTERRUPTED, got %s", cuflash_status_name(r->status));
    CHECK_F(check_contains(r->message, CALLS[r->which].name) && check_contains(r->message, "interrupted|partly written"),
            "the message: %s", r->message);
    CHECK_F(r->ended - told <= SOON_MS, "stopped only after %.0f ms", r->ended - told);
}

static void check_next_calls_work(void) {
    for (int i = 0; i < COUNT_OF(CALLS); i++) CHECK_OK(CALLS[i].call(&small.a));
}

static void test_interrupt(void) {
    for (int i = 0; i < COUNT_OF(CALLS); i++) {
        check_in("interrupt %s", CALLS[i].name);
        int64_t live = check_live_bytes();
        runner r;
        start(&r, i);
        double told = now_ms();
        cuflash_interrupt();
        check_stops(&r, told);
        CHECK(check_live_bytes() == live);
        check_next_calls_work();
    }
    check_in("interrupt when nothing runs");
    cuflash_interrupt();
    check_next_calls_work();
    check_in("interrupt two calls");
    runner a, b;
    start(&a, 0);
    start(&b, 3); /* which writes other outputs */
    double told = now_ms();
    cuflash_interrupt();
    check_stops(&a, told);
    check_stops(&b, told);
    check_next_calls_work();
    check_in("%s", "");
}

/* ---- SIGINT ------------------------------------------------------------------------------------- */

static atomic_int handled; /* by the program's own handler */

static void own_handler(int signal_number) {
    (void)signal_number;
    atomic_fetch_add(&handled, 1);
}

static void own_handler_with_info(int signal_number, siginfo_t *info, void *context) {
    (void)signal_number, (void)info, (void)context;
    atomic_fetch_add(&handled, 1);
}

static bool installed(const struct sigaction *expected) {
    struct sigaction now;
    sigaction(SIGINT, NULL, &now);
    bool info = expected->sa_flags & SA_SIGINFO;
    return info ? now.sa_sigaction == expected->sa_sigaction : now.sa_handler == expected->sa_handler;
}

static void test_off_by_default(void) {
    check_in("SIGINT, off by default");
    runner r;
    atomic_store(&handled, 0);
    start(&r, 0);
    raise(SIGINT);
    CHECK(atomic_load(&handled) == 1); /* the program's handler had it */
    sleep_ms(100);
    CHECK(!atomic_load(&r.done));
    double told = now_ms();
    cuflash_interrupt();
    check_stops(&r, told);
    check_in("%s", "");
}

static void test_sigint(const struct sigaction *own) {
    for (int i = 0; i < COUNT_OF(CALLS); i++) {
        check_in("SIGINT during %s", CALLS[i].name);
        atomic_store(&handled, 0);
        runner r;
        start(&r, i);
        CHECK(!installed(own));
        double told = now_ms();
        raise(SIGINT);
        check_stops(&r, told);
        CHECK(atomic_load(&handled) == 0);
        CHECK(installed(own)); /* given back */
        raise(SIGINT);         /* outside of calls it is the program's */
        CHECK(atomic_load(&handled) == 1);
        check_next_calls_work();
        CHECK(installed(own));
    }
    check_in("%s", "");
}

/* The second SIGINT of a call goes to the handler from before; here it comes right after the first. */
static void test_second_sigint(const struct sigaction *own) {
    check_in("a second SIGINT");
    atomic_store(&handled, 0);
    runner r;
    start(&r, 2);
    double told = now_ms();
    raise(SIGINT);
    CHECK(atomic_load(&handled) == 0);
    raise(SIGINT);
    CHECK(atomic_load(&handled) == 1);
    check_stops(&r, told);
    CHECK(installed(own));
    check_in("%s", "");
}

/* The calling thread itself, with the signal from a timer: as it is with Ctrl-C in an interpreter. */
static void test_timer(const struct sigaction *own) {
    check_in("SIGINT from a timer");
    struct sigevent event = {.sigev_notify = SIGEV_SIGNAL, .sigev_signo = SIGINT};
    timer_t timer;
    CHECK(timer_create(CLOCK_MONOTONIC, &event, &timer) == 0);
    const struct itimerspec when = {.it_value = {0, 100 * 1000000L}};
    double begun = now_ms();
    atomic_store(&handled, 0);
    CHECK(timer_settime(timer, 0, &when, NULL) == 0);
    CHECK_FAILS(CUFLASH_INTERRUPTED, "attention_forward", cuflash_attention_forward(&big.a));
    CHECK(now_ms() - begun <= SOON_MS && now_ms() - begun >= 100);
    CHECK(atomic_load(&handled) == 0 && installed(own));
    timer_delete(timer);
    check_in("%s", "");
}

/* A handler that the program sets during a call stays. */
static void test_changed_handler(const struct sigaction *own) {
    check_in("a handler set during the call");
    runner r;
    start(&r, 0);
    struct sigaction other = {.sa_sigaction = own_handler_with_info, .sa_flags = SA_SIGINFO};
    sigaction(SIGINT, &other, NULL);
    double told = now_ms();
    cuflash_interrupt();
    check_stops(&r, told);
    CHECK(installed(&other));
    check_next_calls_work(); /* and one of that kind is restored after a call as well */
    CHECK(installed(&other));
    sigaction(SIGINT, own, NULL);
    check_in("%s", "");
}

/* Calls that began with the setting off do not end the care for one that began with it on. */
static void test_setting_changes(const struct sigaction *own) {
    check_in("the setting changes during a call");
    atomic_store(&handled, 0);
    runner r;
    start(&r, 0);
    CHECK(cuflash_catch_sigint(false));
    CHECK_OK(cuflash_attention_forward(&small.a));
    CHECK(!cuflash_catch_sigint(true));
    double told = now_ms();
    raise(SIGINT);
    CHECK(atomic_load(&handled) == 0);
    cuflash_interrupt(); /* so that the test ends in any case */
    check_stops(&r, told);
    CHECK(installed(own));
    check_in("%s", "");
}

int main(void) {
    int64_t live = check_live_bytes();
    make(&big, 1000000, 200000);
    make(&small, 40, 20);
    test_interrupt();

    struct sigaction own = {.sa_handler = own_handler};
    sigaction(SIGINT, &own, NULL);
    test_off_by_default();
    CHECK(!cuflash_catch_sigint(true));
    CHECK(cuflash_catch_sigint(true));
    CHECK(installed(&own)); /* on, but no call is running */
    test_sigint(&own);
    test_second_sigint(&own);
    test_timer(&own);
    test_changed_handler(&own);
    test_setting_changes(&own);
    CHECK(cuflash_catch_sigint(false));
    test_off_by_default();
    release(&big);
    release(&small);
    CHECK(check_live_bytes() == live);
    return check_result();
}
