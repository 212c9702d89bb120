// The two roofs of a product: how fast one thread reads memory, and how fast it multiplies bytes in registers
#include <cstdint>
#if defined(__AVX512VNNI__)
#include <immintrin.h>
#endif

extern "C" uint64_t read_all(const uint64_t* p, int64_t words, int64_t ahead) { // `ahead`: how far to ask for each line, 0: not at all, -1: for the first line of the next page
    uint64_t s[32] = {};
    for (int64_t i = 0; i + 32 <= words; i += 32) {
        if (ahead < 0 && !(uintptr_t(p + i) & 3840)) __builtin_prefetch((const char*)(p + i) + 4096);
        if (ahead > 0) for (int j = 0; j < 4; j++) __builtin_prefetch((const char*)(p + i) + ahead + 64 * j);
        for (int j = 0; j < 32; j++) s[j] += p[i + j];
    }
    uint64_t sum = 0;
    for (uint64_t v : s) sum += v;
    return sum;
}

extern "C" int64_t multiply(int64_t rounds) { // products of bytes done, 0 where there is no such instruction
#if defined(__AVX512VNNI__)
    __m512i s[12] = {}, a = _mm512_set1_epi8(3), b = _mm512_set1_epi8(5);
    for (int64_t i = 0; i < rounds; i++)
        #pragma GCC unroll 12
        for (int j = 0; j < 12; j++) asm volatile("vpdpbusd %2, %1, %0" : "+v"(s[j]) : "v"(a), "v"(b));
    return rounds * 12 * 64;
#else
    return 0;
#endif
}
