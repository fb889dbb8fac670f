// x86-64 with AVX2, FMA and F16C (2013 and later).
#define OMNIGENE_TABLE avx2_kernels
#define OMNIGENE_NAME "avx2"
#define OMNIGENE_WIDTH 8
#define OMNIGENE_BF16 0
#define OMNIGENE_DOT_MAX 5
#include "isa.h"
