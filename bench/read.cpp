// The two roofs of a product: how fast one thread reads memory, and how fast it multiplies bytes in registers
#include <cstdint>
#if defined(__AVX2__)
#include <immintrin.h>
#endif

// `ahead`: how far to ask for each line; 0: not at all; -1: only for the first line of the next page
typedef uint64_t Line __attribute__((vector_size(64), aligned(8)));

template <int ahead> static uint64_t walk(const uint64_t* p, int64_t words) {
    Line s0 = {}, s1 = {}, s2 = {}, s3 = {};
    for (const uint64_t* end = p + words; p < end; p += 32) {
        if (ahead < 0 && !(uintptr_t(p) & 3840)) __builtin_prefetch((const char*)p + 4096);
        if (ahead > 0) for (int j = 0; j < 4; j++) __builtin_prefetch((const char*)p + ahead + 64 * j);
        const Line* line = (const Line*)p;
        s0 += line[0]; s1 += line[1]; s2 += line[2]; s3 += line[3];
    }
    s0 += s1 + s2 + s3;
    uint64_t sum = 0;
    for (int j = 0; j < 8; j++) sum += s0[j];
    return sum;
}

extern "C" uint64_t read_all(const uint64_t* p, int64_t words, int way) {
    return (way == 0 ? walk<0> : way == 1 ? walk<-1> : way == 2 ? walk<1024> : way == 3 ? walk<2048> : walk<4096>)(p, words / 32 * 32);
}

extern "C" int64_t multiply(int64_t rounds) { // products of bytes done, 0 where there is no such instruction
#if defined(__AVX512VNNI__)
    __m512i s[12] = {}, a = _mm512_set1_epi8(3), b = _mm512_set1_epi8(5);
    for (int64_t i = 0; i < rounds; i++)
        #pragma GCC unroll 12
        for (int j = 0; j < 12; j++) asm volatile("vpdpbusd %2, %1, %0" : "+v"(s[j]) : "v"(a), "v"(b));
    return rounds * 12 * 64;
#elif defined(__AVX2__)
    __m256i s[12] = {}, a = _mm256_set1_epi8(3), b = _mm256_set1_epi8(5);
    for (int64_t i = 0; i < rounds; i++)
        #pragma GCC unroll 12
        for (int j = 0; j < 12; j++) { __m256i t; asm volatile("vpmaddubsw %2, %1, %0" : "=x"(t) : "x"(a), "x"(b)); s[j] = _mm256_add_epi16(s[j], t); }
    return rounds * 12 * 32 + (_mm256_extract_epi16(s[0], 0) & 0);
#else
    return 0;
#endif
}
