/* Assertions that stay on in production: arguments, state and invariants of our own code. Never on
 * bytes that came from a client, a disk or a config file: those get an error.
 */
#ifndef KVT_ENGINE_ASSERT_H
#define KVT_ENGINE_ASSERT_H

#ifdef __cplusplus
extern "C" {
#endif

/* Called before the process traps; a daemon sets one that writes the line. NULL: none. */
typedef void (*kvt_assert_hook)(const char *file, int line, const char *condition);
void kvt_assert_hook_set(kvt_assert_hook hook);

void kvt_assert_failed(const char *file, int line, const char *condition)
    __attribute__((noreturn, cold));

#define KVT_ASSERT(condition)                                  \
    do {                                                       \
        if (__builtin_expect(!(condition), 0)) {               \
            kvt_assert_failed(__FILE__, __LINE__, #condition); \
        }                                                      \
    } while (0)

#ifdef __cplusplus
}
#endif
#endif
