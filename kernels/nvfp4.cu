// Maxima and quantization. Both read each weight once and are limited by memory.

// slot = max(slot, max |x|). Non-negative floats order like their bits and NaN's are the largest, so an integer
// maximum keeps NaN, and its result does not depend on the order of blocks.
extern "C" __global__ void amax(const Element *x, u64 n, u32 *slot) {
    u32 top = 0;
    u64 first = thread_of_grid(), stride = (u64)gridDim.x * blockDim.x, packs = n / PACK;
    for (u64 i = first; i < packs; i += stride) {
        Pack pack = ((const Pack *)x)[i];
#pragma unroll
        for (int j = 0; j < PACK; j++) top = max(top, __float_as_uint(get(pack.at[j])) & 0x7FFFFFFF);
    }
    for (u64 i = packs * PACK + first; i < n; i += stride) top = max(top, __float_as_uint(get(x[i])) & 0x7FFFFFFF);
    for (int lanes = 16; lanes > 0; lanes /= 2) top = max(top, __shfl_xor_sync(0xFFFFFFFF, top, lanes));
    if (threadIdx.x % 32 == 0) atomicMax(slot, top);
}

// E2M1 by counting thresholds; ties go to the even code.
__device__ __forceinline__ u32 e2m1(float x) {
    float a = fabsf(x);
    u32 index = (a > 0.25f) + (a >= 0.75f) + (a > 1.25f) + (a >= 1.75f) + (a > 2.5f) + (a >= 3.5f) + (a > 5.0f);
    return index | (x < 0 ? 8 : 0);
}

// E4M3 of a value in [2^-9, 448], to nearest, ties to even.
__device__ __forceinline__ u8 e4m3(float x) {
    u32 subnormal = __float_as_uint(x + 16384.0f) & 0xFF;
    u32 bits = __float_as_uint(x);
    u32 normal = ((bits + 0x7FFFF + ((bits >> 20) & 1)) >> 20) - (120 << 3);
    return (u8)(x < 1.0f / 64 ? subnormal : normal);
}

__device__ __forceinline__ float e4m3_value(u8 byte) {
    u32 exponent = byte >> 3, mantissa = byte & 7;
    return exponent == 0 ? mantissa * (1.0f / 512) : __uint_as_float(((exponent + 120) << 23) | (mantissa << 20));
}

// One thread a block of 16: eight bytes of codes and a scale. Divisions are correctly rounded (no fast math),
// which makes the bytes those of the CPU.
extern "C" __global__ void quantize(const Element *w, u64 blocks, float global, u64 *codes, u8 *scales) {
    u64 block = thread_of_grid();
    if (block >= blocks) return;
    float x[16];
    u32 top = 0;
#pragma unroll
    for (int p = 0; p < 16 / PACK; p++) {
        Pack pack = ((const Pack *)w)[block * (16 / PACK) + p];
#pragma unroll
        for (int j = 0; j < PACK; j++) {
            x[p * PACK + j] = get(pack.at[j]);
            top = max(top, __float_as_uint(x[p * PACK + j]) & 0x7FFFFFFF);
        }
    }
    float s = __fdiv_rn(__uint_as_float(top), 6.0f * global);
    s = s == 0 ? 1.0f : s;
    u8 scale = e4m3(fminf(fmaxf(s, 1.0f / 512), 448.0f));
    float step = e4m3_value(scale) * global;
    u64 packed = 0;
    for (int i = 0; i < 16; i++) packed |= (u64)e2m1(__fdiv_rn(x[i], step)) << (4 * i);
    codes[block] = packed;
    scales[block] = scale;
}

// amax[c] = max(amax[c], max |x[.][c]|) and squares[c] += sum of x[.][c]^2. A block takes 32 channels; each of its 16
// warps sums every sixteenth row, and the warps' sums are added in order, so sums depend on nothing else. Limited by
// memory: a warp reads neighbouring channels, and sixteen of them keep enough reads on their way.
extern "C" __global__ void __launch_bounds__(512) channel_sums(const Element *x, int rows, int cols, u32 *amax, float *squares) {
    __shared__ u32 tops[16][32];
    __shared__ float sums[16][32];
    int lane = threadIdx.x % 32, warp = threadIdx.x / 32, channel = blockIdx.x * 32 + lane;
    u32 top = 0;
    float sum = 0;
#pragma unroll 4
    for (int row = warp; row < rows; row += 16) {
        float value = channel < cols ? fabsf(get(x[(u64)row * cols + channel])) : 0;
        top = max(top, __float_as_uint(value));
        sum += value * value;
    }
    tops[warp][lane] = top;
    sums[warp][lane] = sum;
    __syncthreads();
    if (warp != 0 || channel >= cols) return;
    top = amax[channel];
    sum = 0;
    for (int w = 0; w < 16; w++) {
        top = max(top, tops[w][lane]);
        sum += sums[w][lane];
    }
    amax[channel] = top;
    squares[channel] += sum;
}

// Quantizes and dequantizes inputs in place as engines do: a block scale E4M3(min(448, divisor * (amax / 6))), a
// block whose scale rounds to zero becomes zero. One thread a block of 16.
extern "C" __global__ void quantize_input(Element *x, u64 blocks, float divisor) {
    u64 block = thread_of_grid();
    if (block >= blocks) return;
    Element *at = x + block * 16;
    float top = 0;
    for (int i = 0; i < 16; i++) top = fmaxf(top, fabsf(get(at[i])));
    float scale = e4m3_value(e4m3(fminf(divisor * (top * (1.0f / 6.0f)), 448.0f)));
    const float magnitudes[8] = {0.0f, 0.5f, 1.0f, 1.5f, 2.0f, 3.0f, 4.0f, 6.0f};
    float step = scale / divisor;
    for (int i = 0; i < 16; i++) {
        u32 code = scale == 0 ? 0 : e2m1(get(at[i]) / step);
        float value = magnitudes[code & 7] * step;
        at[i] = round_to_element(scale == 0 ? 0.0f : (code & 8 ? -value : value));
    }
}
