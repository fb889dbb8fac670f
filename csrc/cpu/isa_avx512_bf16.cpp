// AVX-512 with BF16 dot products (AMD Zen 4 and later, Intel Cooper Lake, Sapphire Rapids and later).
#define OMNIGENE_TABLE avx512_bf16_kernels
#define OMNIGENE_NAME "avx512_bf16"
#define OMNIGENE_WIDTH 16
#define OMNIGENE_BF16 1
#define OMNIGENE_DOT_MAX 8
#include "isa.h"
