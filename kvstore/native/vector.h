// Functions in several versions, of which the processor's best is taken when the module is loaded.
#pragma once

#if defined(__x86_64__) && defined(__linux__) && defined(__GNUC__) && !defined(__clang__)
#if __GNUC__ >= 12
#define KVSTORE_VECTOR __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else  // which knows the levels, but not how to choose by them
#define KVSTORE_VECTOR __attribute__((target_clones("avx512f", "avx2", "default")))
#endif
#else
#define KVSTORE_VECTOR
#endif
