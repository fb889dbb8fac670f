// Vectors of OMNIGENE_WIDTH floats, written with the compiler's vector extensions so that one source serves every
// instruction set; intrinsics only where the language has no word for it (half precision, dot products of bf16 pairs).
#pragma once
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <utility>
#if !defined(OMNIGENE_NO_X86)
#include <immintrin.h>
#endif

#define INLINE inline __attribute__((always_inline))
// An asm operand that keeps a vector's computation alive.
#if defined(__AVX2__)
#define OMNIGENE_KEEP(x) "+v"(x)
#else
#define OMNIGENE_KEEP(x) "+m"(x)  // two registers: no register constraint holds them
#endif


namespace omnigene {
namespace {

constexpr int W = OMNIGENE_WIDTH;
typedef float VF __attribute__((vector_size(4 * W)));
typedef float VFu __attribute__((vector_size(4 * W), aligned(4), may_alias));
typedef int32_t VI __attribute__((vector_size(4 * W)));
typedef uint32_t VU __attribute__((vector_size(4 * W)));
typedef uint16_t VH __attribute__((vector_size(2 * W)));
typedef uint16_t VHu __attribute__((vector_size(2 * W), aligned(2), may_alias));
typedef uint8_t VBytes __attribute__((vector_size(4 * W)));

INLINE VF vset(float x) { return x - VF{}; }
INLINE VF vload(const float* p) { return *reinterpret_cast<const VFu*>(p); }
INLINE void vstore(float* p, VF x) { *reinterpret_cast<VFu*>(p) = x; }
INLINE VF vmax(VF a, VF b) { return a < b ? b : a; }  // a NaN in a stays
INLINE VF vmin(VF a, VF b) { return a > b ? b : a; }

INLINE float vsum(VF x) {
#if OMNIGENE_WIDTH == 16
  return _mm512_reduce_add_ps((__m512)x);
#else
  float s[W];
  vstore(s, x);
  for (int h = W / 2; h; h /= 2)
    for (int i = 0; i < h; ++i) s[i] += s[i + h];
  return s[0];
#endif
}
INLINE float vtop(VF x) {  // the largest lane
#if OMNIGENE_WIDTH == 16
  return _mm512_reduce_max_ps((__m512)x);
#else
  float s[W];
  vstore(s, x);
  for (int h = W / 2; h; h /= 2)
    for (int i = 0; i < h; ++i) s[i] = s[i] < s[i + h] ? s[i + h] : s[i];
  return s[0];
#endif
}
INLINE int first_equal(VF x, float y) {  // the first lane that equals y; one does
#if OMNIGENE_WIDTH == 16
  return __builtin_ctz(_mm512_cmp_ps_mask((__m512)x, _mm512_set1_ps(y), _CMP_EQ_OQ));
#else
  int i = 0;
  while (x[i] != y) ++i;
  return i;
#endif
}

struct bf16 {
  uint16_t bits;
};
struct f16 {
  uint16_t bits;
};

INLINE float to_float(float x) { return x; }
INLINE float float_of(uint32_t bits) {
  float f;
  std::memcpy(&f, &bits, sizeof f);
  return f;
}
INLINE float to_float(bf16 x) { return float_of(uint32_t(x.bits) << 16); }
INLINE float to_float(f16 x) {
  const uint32_t sign = uint32_t(x.bits & 0x8000) << 16, rest = uint32_t(x.bits & 0x7fff) << 13;
  if ((x.bits & 0x7c00) == 0x7c00) return float_of(sign | rest | 0x7f800000);  // Inf, NaN
  return float_of(sign | rest) * 0x1p112f;  // subnormals come out right as well
}

INLINE bf16 round_to(float x, bf16*) {
  uint32_t u;
  std::memcpy(&u, &x, 4);
  if ((u & 0x7fffffff) > 0x7f800000) return {uint16_t(0x7fc0)};
  return {uint16_t((u + 0x7fff + ((u >> 16) & 1)) >> 16)};
}
INLINE float round_to(float x, float*) { return x; }
INLINE f16 round_to(float x, f16*) {
  uint32_t u;
  std::memcpy(&u, &x, 4);
  const uint32_t sign = (u >> 16) & 0x8000;
  u &= 0x7fffffff;
  if (u > 0x7f800000) return {uint16_t(sign | 0x7e00)};
  if (u >= 0x477ff000) return {uint16_t(sign | 0x7c00)};  // >= 65520 rounds to Inf
  if (u < 0x38800000) {                                   // subnormal: let an addition do the rounding
    float f;
    std::memcpy(&f, &u, 4);
    f += 0.5f;
    std::memcpy(&u, &f, 4);
    return {uint16_t(sign | (u - 0x3f000000))};
  }
  return {uint16_t(sign | ((u + 0xfff + ((u >> 13) & 1) - (112u << 23)) >> 13))};
}

// Numbers of 8 bits, which float32 and bf16 hold exactly. Those of e4m3 come out of every load divided by 2^8, which the
// shift to half precision leaves and unit_of gives back.
struct i8 {
  int8_t bits;
};
struct e4m3 {  // sign, 4 bits of exponent with bias 7, 3 of mantissa; all ones are NaN, and there is no infinity
  uint8_t bits;
};
template <class T>
constexpr bool IS_STORED = std::is_same_v<T, i8> || std::is_same_v<T, e4m3>;
template <class T>
constexpr float unit_of = std::is_same_v<T, e4m3> ? 256.0f : 1.0f;

INLINE VF load_as_float(const float* p) { return vload(p); }
INLINE VI load_signed_bytes(const void* p) {
#if OMNIGENE_WIDTH == 16
  return (VI)_mm512_cvtepi8_epi32(_mm_loadu_si128(static_cast<const __m128i*>(p)));
#elif defined(__AVX2__)
  return (VI)_mm256_cvtepi8_epi32(_mm_loadl_epi64(static_cast<const __m128i*>(p)));
#else
  VI x;
  int8_t b[W];
  std::memcpy(b, p, W);
  for (int i = 0; i < W; ++i) x[i] = b[i];
  return x;
#endif
}
INLINE VF load_as_float(const i8* p) { return __builtin_convertvector(load_signed_bytes(p), VF); }
// A NaN comes out as 480: see load_any.
INLINE VF load_as_float(const e4m3* p) {
#if OMNIGENE_WIDTH == 16
  const __m256i b = _mm256_cvtepi8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
  return (VF)_mm512_maskz_cvtph_ps(0xffff, _mm256_and_si256(_mm256_slli_epi16(b, 7), _mm256_set1_epi16(short(0xbf80))));
#elif defined(__F16C__)
  const __m128i b = _mm_cvtepi8_epi16(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)));
  return (VF)_mm256_cvtph_ps(_mm_and_si128(_mm_slli_epi16(b, 7), _mm_set1_epi16(short(0xbf80))));
#else
  const VU bits = ((VU)load_signed_bytes(p) << 20) & 0x87f00000u;
  return (VF)bits * 0x1p112f;  // subnormals come out right as well
#endif
}
template <class T>
INLINE VF load_any(const T* p) {  // and NaN where the stored number is
  const VF x = load_as_float(p);
  if constexpr (std::is_same_v<T, e4m3>)
    return (load_signed_bytes(p) & 0x7f) == 0x7f ? vset(__builtin_nanf("")) : x;
  return x;
}
INLINE VF load_as_float(const bf16* p) {
  const VH h = *reinterpret_cast<const VHu*>(p);
  return (VF)(__builtin_convertvector(h, VU) << 16);
}
INLINE VF load_as_float(const f16* p) {
#if OMNIGENE_WIDTH == 16
  return (VF)_mm512_maskz_cvtph_ps(0xffff, _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
#elif defined(__F16C__)
  return (VF)_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
#else
  VF x;
  for (int i = 0; i < W; ++i) x[i] = to_float(p[i]);
  return x;
#endif
}

INLINE VU bf16_bits(VF x) {  // round to nearest even; the 16 bits stand in the low half
  const VU u = (VU)x;
  const VU rounded = (u + 0x7fff + ((u >> 16) & 1)) >> 16;
  return (VU)((VI)((u & 0x7fffffff) > 0x7f800000) ? (VI)(VU{} + 0x7fc0) : (VI)rounded);
}
INLINE void store_rounded(float* p, VF x) { vstore(p, x); }
INLINE void store_rounded(bf16* p, VF x) {
#if OMNIGENE_BF16
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), (__m256i)_mm512_cvtneps_pbh((__m512)x));
#else
  *reinterpret_cast<VHu*>(p) = __builtin_convertvector(bf16_bits(x), VH);
#endif
}
INLINE void store_rounded(f16* p, VF x) {
#if OMNIGENE_WIDTH == 16
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_maskz_cvtps_ph(0xffff, (__m512)x, 0));
#elif defined(__F16C__)
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph((__m256)x, 0));
#else
  for (int i = 0; i < W; ++i) p[i] = round_to(x[i], p);
#endif
}
// The first `live` lanes, all of them from W on.
template <class T>
INLINE void store_live(T* p, VF x, int64_t live) {
  if (live >= W) return store_rounded(p, x);
  T part[W];
  store_rounded(part, x);
  std::memcpy(static_cast<void*>(p), part, live * sizeof(T));
}
// x rounded to T and back: where transformers writes a tensor of dtype T.
INLINE VF rounded_through(VF x, float*) { return x; }
INLINE VF rounded_through(VF x, bf16*) {
#if OMNIGENE_BF16
  return (VF)_mm512_slli_epi32(_mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh((__m512)x)), 16);
#else
  return (VF)(bf16_bits(x) << 16);
#endif
}
INLINE VF rounded_through(VF x, f16*) {
  f16 h[W];
  store_rounded(h, x);
  return load_as_float(h);
}

// exp by 2^n times a degree-6 polynomial on [-ln2/2, ln2/2]; 1-2 ulp. NaN stays NaN.
INLINE VF vexp(VF x) {
  x = vmin(vmax(x, vset(-87.0f)), vset(88.0f));
  const VF magic = vset(12582912.0f);  // adding 1.5 * 2^23 rounds to an integer
  VF n = x * 1.44269504088896f;
  n = (n + magic) - magic;
  VF r = x - n * 0.693359375f;
  r = r + n * 2.12194440e-4f;
  VF p = r * 1.3981999507e-3f + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * (r * r) + r + 1.0f;
  // n is an integer between -126 and 127 here, or NaN, whose product below is NaN whatever the scale.
  const VI scale = (__builtin_convertvector(n, VI) + 127) << 23;
  return p * (VF)scale;
}
// exp for x <= 0 that goes on through the subnormals to zero, as softmax needs: the top-k order of tiny probabilities.
INLINE VF vexp_below(VF x) {
  x = vmax(x, vset(-104.0f));  // exp(-104) rounds to zero
  const VF half = vset(0.5f) * x;
  const VF root = vexp(half);
  return root * root;
}
INLINE VF sigmoid(VF x) { return 1.0f / (1.0f + vexp(-x)); }

// By erf, after Abramowitz & Stegun 7.1.26, absolute error 1.5e-7.
INLINE VF normal_cdf(VF g) {
  const VF x = g * 0.7071067811865476f;
  const VF a = x < 0.0f ? -x : x;
  const VF t = 1.0f / (1.0f + 0.3275911f * a);
  VF p = 1.061405429f * t - 1.453152027f;
  p = p * t + 1.421413741f;
  p = p * t - 0.284496736f;
  p = (p * t + 0.254829592f) * t;
  const VF tail = 0.5f * p * vexp(-a * a);  // 0.5 erfc(|x|)
  return x < 0.0f ? tail : 1.0f - tail;
}

template <int A>
INLINE VF activate(VF g) {
  if constexpr (A == 2) return g * sigmoid(g);  // silu
  // 0.5 (1 + tanh(z)) = sigmoid(2z), z = sqrt(2/pi) (g + 0.044715 g^3)
  if constexpr (A == 0) return g * sigmoid(1.5957691216057308f * (g + 0.044715f * g * g * g));
  return g * normal_cdf(g);
}

// activate(g) and its derivative. Far from zero the derivative is 0 or 1, so the polynomial's argument is bounded there
// and cannot overflow.
template <int A>
INLINE void activate_with_slope(VF g, VF& value, VF& slope) {
  if constexpr (A == 2) {
    const VF s = sigmoid(g), b = vmin(vmax(g, vset(-100.0f)), vset(100.0f));
    value = g * s;
    slope = s + b * s * (1.0f - s);
  } else if constexpr (A == 0) {
    const VF b = vmin(vmax(g, vset(-30.0f)), vset(30.0f)), square = b * b;
    const VF s = sigmoid(1.5957691216057308f * b * (1.0f + 0.044715f * square));
    value = g * s;
    slope = s + b * s * (1.0f - s) * 1.5957691216057308f * (1.0f + 0.134145f * square);
  } else {
    const VF b = vmin(vmax(g, vset(-30.0f)), vset(30.0f));
    const VF below = normal_cdf(b);
    value = g * below;
    slope = below + b * 0.3989422804014327f * vexp(-0.5f * b * b);
  }
}

// One butterfly step of a W x W transposition or reduction: lanes whose bit D is clear come from a, the others from b.
template <int D, int... L>
INLINE VF keep_lanes(VF a, VF b, std::integer_sequence<int, L...>) {
  return __builtin_shufflevector(a, b, ((L & D) ? L + W : L)...);
}
template <int D, int... L>
INLINE VF swap_lanes(VF a, VF b, std::integer_sequence<int, L...>) {
  return __builtin_shufflevector(a, b, ((L & D) ? (L ^ D) + W : (L ^ D))...);
}
template <int D, int... L>
INLINE VF low_lanes(VF a, VF b, std::integer_sequence<int, L...>) {  // a's clear lanes stay, b's clear lanes move up
  return __builtin_shufflevector(a, b, ((L & D) ? (L ^ D) + W : L)...);
}
template <int D, int... L>
INLINE VF high_lanes(VF a, VF b, std::integer_sequence<int, L...>) {  // a's set lanes move down, b's set lanes stay
  return __builtin_shufflevector(a, b, ((L & D) ? L + W : (L ^ D))...);
}
using Lanes = std::make_integer_sequence<int, W>;

// Lane i of the result is the sum over all lanes of a[i].
template <int D = W / 2>
INLINE VF sum_each(VF* a) {
#pragma GCC unroll 16
  for (int j = 0; j < D; ++j) a[j] = keep_lanes<D>(a[j], a[j + D], Lanes{}) + swap_lanes<D>(a[j], a[j + D], Lanes{});
  if constexpr (D > 1) return sum_each<D / 2>(a);
  return a[0];
}

// a[i][j] -> a[j][i]
template <int D = W / 2>
INLINE void transpose(VF* a) {
#pragma GCC unroll 16
  for (int j = 0; j < W; ++j) {
    if (j & D) continue;
    const VF low = low_lanes<D>(a[j], a[j + D], Lanes{}), high = high_lanes<D>(a[j], a[j + D], Lanes{});
    a[j] = low;
    a[j + D] = high;
  }
  if constexpr (D > 1) transpose<D / 2>(a);
}

}  // namespace
}  // namespace omnigene
