// AVX-512 F, BW, VL, DQ: bf16 weights are widened to float.
#define OMNIGENE_TABLE avx512_kernels
#define OMNIGENE_NAME "avx512"
#define OMNIGENE_WIDTH 16
#define OMNIGENE_BF16 0
#define OMNIGENE_DOT_MAX 8
#include "isa.h"
