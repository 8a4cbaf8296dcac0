/*
 * Preloaded into QEMU when it emulates the CPU (TCG) and may be protected.
 *
 * At each COLO checkpoint QEMU's migration thread ends the copy of memory without holding QEMU's big lock. Under TCG
 * the end of dirty logging runs work on every virtual CPU and waits for it with pthread_cond_wait() on the big lock,
 * which the thread does not own. glibc takes the lock on the way out of the wait; the thread then waits for ever for
 * a lock that it holds itself, and the whole process with it.
 *
 * To wait with a mutex that one does not own is undefined. Here it is defined: such a wait lasts a moment and returns
 * as a spurious wakeup, which every correct caller answers by looking at its condition again.
 *
 * The same missing lock loses wakeups: the virtual CPU finds its list of work empty, the thread adds work and wakes
 * it, and only then does the virtual CPU go to sleep. With the lock held the two could not pass each other. So as long
 * as somebody waits in the way above, those who sleep on that mutex are woken again and again, which is a spurious
 * wakeup too. All other waits pass through untouched.
 *
 * Under KVM nobody waits there, and the library is not used.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stddef.h>
#include <stdlib.h>
#include <time.h>
#include <unistd.h>

typedef int (*cond_wait)(pthread_cond_t *, pthread_mutex_t *);

static cond_wait next_cond_wait;
static _Thread_local pid_t self; /* asked once per thread: the call costs as much as the wait it guards */

/* Who sleeps with a mutex of their own; a sleeper that finds no place is not woken, as without this library. */
enum { PLACES = 256 };
static struct {
    _Atomic(pthread_cond_t *) condition;
    _Atomic(pthread_mutex_t *) mutex;
} sleeping[PLACES];

static size_t go_to_bed(pthread_cond_t *condition, pthread_mutex_t *mutex)
{
    for (size_t place = 0; place < PLACES; place++) {
        pthread_cond_t *nobody = NULL;

        if (atomic_load(&sleeping[place].condition) == NULL &&
            atomic_compare_exchange_strong(&sleeping[place].condition, &nobody, condition)) {
            atomic_store(&sleeping[place].mutex, mutex);
            return place;
        }
    }
    return PLACES;
}

static void get_up(size_t place)
{
    if (place < PLACES) {
        atomic_store(&sleeping[place].mutex, NULL);
        atomic_store(&sleeping[place].condition, NULL);
    }
}

static void wake_sleepers(pthread_mutex_t *mutex)
{
    for (size_t place = 0; place < PLACES; place++) {
        pthread_cond_t *condition = atomic_load(&sleeping[place].condition);

        if (condition != NULL && atomic_load(&sleeping[place].mutex) == mutex)
            pthread_cond_broadcast(condition);
    }
}

static void forget_self(void)
{
    self = 0;
}

/* The version that programs are linked against: the oldest one is another function on some machines. */
__attribute__((constructor)) static void find_next(void)
{
    static const char *const versions[] = {"GLIBC_2.3.2", "GLIBC_2.17", "GLIBC_2.27", "GLIBC_2.2"};

    for (size_t i = 0; next_cond_wait == NULL && i < sizeof(versions) / sizeof(*versions); i++)
        next_cond_wait = (cond_wait)dlvsym(RTLD_NEXT, "pthread_cond_wait", versions[i]);
    if (next_cond_wait == NULL)
        next_cond_wait = (cond_wait)dlsym(RTLD_NEXT, "pthread_cond_wait");
    if (next_cond_wait == NULL)
        abort();
    pthread_atfork(NULL, NULL, forget_self);
}

int pthread_cond_wait(pthread_cond_t *condition, pthread_mutex_t *mutex)
{
    if (self == 0)
        self = gettid();
    if (mutex->__data.__owner != self) {
        const struct timespec moment = {.tv_sec = 0, .tv_nsec = 100 * 1000};

        nanosleep(&moment, NULL);
        wake_sleepers(mutex);
        return 0;
    }
    if (next_cond_wait == NULL) /* called by a constructor that ran before ours */
        find_next();
    size_t place = go_to_bed(condition, mutex);
    int result = next_cond_wait(condition, mutex);
    get_up(place);
    return result;
}
