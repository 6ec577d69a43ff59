// Code for each generation of vector instructions.

#ifndef EASYDEL_NATIVE_PROCESSORS_H_
#define EASYDEL_NATIVE_PROCESSORS_H_

// The same function for each of them; the loader picks the one that the processor has.
#if defined(__x86_64__) && defined(__linux__)
#define EASYDEL_FOR_EACH_PROCESSOR __attribute__((target_clones("default", "arch=x86-64-v3", "arch=x86-64-v4")))
#else
#define EASYDEL_FOR_EACH_PROCESSOR
#endif

// Inlined into functions for each of them, whose instructions it then uses.
#define EASYDEL_INLINE static inline __attribute__((always_inline))

// Of functions for AVX-512, for AVX2 with FMA and for any processor, the one with the widest instructions that this has;
// the first two need not be there where there are no such processors.
#if defined(__x86_64__)
#define EASYDEL_WIDEST(avx512, avx2, any)                                               \
  (__builtin_cpu_supports("avx512f") ? (avx512)                                         \
   : __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") ? (avx2) : (any))
#else
#define EASYDEL_WIDEST(avx512, avx2, any) (any)
#endif

#endif  // EASYDEL_NATIVE_PROCESSORS_H_
