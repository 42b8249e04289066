/* Copying memory; see move.h.
 *
 * A plain copy of a large range first reads each cache line of the target, only to overwrite it.
 * Stores that go past the caches save that third of the traffic: measured on an EPYC (Zen 4), 20
 * against 10 GB/s with one thread and 25 against 17 with two; memcpy's own streaming path begins
 * far above the size of our copies. SSE2 is part of x86-64, and wider registers were no faster.
 */
#include "tiers/device/cpu/move.h"

#include <stdint.h>
#include <string.h>

#ifdef __SSE2__
#include <emmintrin.h>

enum { LINE_BYTES = 64 };

static void move_streaming(uint8_t *target, const uint8_t *source, size_t bytes) {
    size_t before = (LINE_BYTES - (uintptr_t)target % LINE_BYTES) % LINE_BYTES;
    memcpy(target, source, before);
    target += before;
    source += before;
    bytes -= before;
    for (; bytes >= LINE_BYTES; bytes -= LINE_BYTES) {
        const __m128i *from = (const __m128i *)(const void *)source;
        __m128i *to = (__m128i *)(void *)target;
        __m128i a = _mm_loadu_si128(from);
        __m128i b = _mm_loadu_si128(from + 1);
        __m128i c = _mm_loadu_si128(from + 2);
        __m128i d = _mm_loadu_si128(from + 3);
        _mm_stream_si128(to, a);
        _mm_stream_si128(to + 1, b);
        _mm_stream_si128(to + 2, c);
        _mm_stream_si128(to + 3, d);
        source += LINE_BYTES;
        target += LINE_BYTES;
    }
    memcpy(target, source, bytes);
    _mm_sfence(); /* such stores are not ordered by a release store alone */
}
#endif

void kvt_cpu_move(void *target, const void *source, size_t bytes, bool streaming) {
#ifdef __SSE2__
    if (streaming && bytes >= LINE_BYTES) {
        move_streaming(target, source, bytes);
        return;
    }
#else
    (void)streaming;
#endif
    memcpy(target, source, bytes);
}
