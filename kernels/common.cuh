// What every kernel file begins with. Header-free, so that NVRTC compiles it without a toolkit.
//
// ELEMENT_BF16 or ELEMENT_F32 chooses the dtype of activations and weights: a backend has one.

typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;

#ifndef INFINITY
#define INFINITY __int_as_float(0x7F800000)
#endif

#ifdef ELEMENT_BF16
struct Element {
    u16 bits;
};
__device__ __forceinline__ float get(Element x) { return __uint_as_float((u32)x.bits << 16); }
__device__ __forceinline__ float get(float x) { return x; }
// To nearest, ties to even; NaN stays a quiet NaN.
__device__ __forceinline__ Element round_to_element(float x) {
    u32 bits = __float_as_uint(x);
    u32 rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16;
    bool nan = (bits & 0x7FFFFFFF) > 0x7F800000;
    return Element{(u16)(nan ? (bits >> 16) | 0x40 : rounded)};
}
#else
typedef float Element;
__device__ __forceinline__ float get(Element x) { return x; }
__device__ __forceinline__ Element round_to_element(float x) { return x; }
#endif

// What storing a value would make of it.
__device__ __forceinline__ float rounded(float x) { return get(round_to_element(x)); }

// N neighbouring elements, loaded and stored at a time. Accesses narrower than sixteen bytes leave memory idle, so
// kernels take PACK elements where rows allow it.
template <int N, typename T = Element> struct __align__(N * sizeof(T) < 16 ? N * sizeof(T) : 16) Several {
    T at[N];
};
constexpr int PACK = 16 / sizeof(Element);
typedef Several<PACK> Pack;

// The number of this thread in the grid.
__device__ __forceinline__ u64 thread_of_grid() { return (u64)blockIdx.x * blockDim.x + threadIdx.x; }
