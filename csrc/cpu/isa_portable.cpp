// Any processor: no flags beyond the compiler's default.
#define OMNIGENE_TABLE portable_kernels
#define OMNIGENE_NAME "portable"
#define OMNIGENE_WIDTH 8
#define OMNIGENE_BF16 0
#define OMNIGENE_DOT_MAX 5
#include "isa.h"
