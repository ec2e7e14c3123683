// What choosing codes needs, on f32 matrices: compiled with ELEMENT_F32, behind nvfp4.cu. Products are cuBLAS's.
// Sums have a fixed order, so that a card gives the same bits every time.

#define TILE 64

// A matrix is f32, or `brief`: BF16 values that are exact up to a factor for the whole matrix.
__device__ __forceinline__ float at(const void *x, int brief, u64 i) {
    return brief ? __uint_as_float((u32)((const u16 *)x)[i] << 16) : ((const float *)x)[i];
}

struct __align__(16) Sixteen {
    u16 at[16];
};

// The upper 16 bits of a value that has no others.
__device__ __forceinline__ u16 shortened(float x) { return (u16)(__float_as_uint(x) >> 16); }

extern "C" __global__ void widen(const u16 *x, float factor, u64 n, float *out) {
    u64 i = thread_of_grid();
    if (i < n) out[i] = at(x, 1, i) * factor;
}

// Copies what is below the diagonal to its place above it, a tile of 32 x 32 a block of 32 x 8 threads.
extern "C" __global__ void mirror(float *x, int n) {
    __shared__ float tile[32][33];
    int down = blockIdx.x * 32, across = blockIdx.y * 32;
    if (across > down) return;
    for (int i = threadIdx.y; i < 32; i += 8) {
        int row = down + i, column = across + threadIdx.x;
        if (row < n && column < n) tile[i][threadIdx.x] = x[(u64)row * n + column];
    }
    __syncthreads();
    for (int i = threadIdx.y; i < 32; i += 8) {
        int row = across + i, column = down + threadIdx.x;
        if (row < n && column < n && column > row) x[(u64)row * n + column] = tile[threadIdx.x][i];
    }
}

// out[i][j] = x[i][j] * (rows[i] * columns[j]); a missing factor is 1. `out` may be `x`.
extern "C" __global__ void scale(const float *x, u64 n, int cols, const float *rows, const float *columns, float *out) {
    u64 i = thread_of_grid();
    if (i >= n) return;
    float factor = rows ? rows[i / cols] : 1.0f;
    out[i] = x[i] * (columns ? factor * columns[i % cols] : factor);
}

extern "C" __global__ void divide(const void *x, int brief, float factor, u64 n, int cols, const float *by, float *out) {
    u64 i = thread_of_grid();
    if (i < n) out[i] = at(x, brief, i) * factor / by[i % cols];
}

// Inputs as engines see them, times the divisor: x[i][j] * factors[j], quantized in blocks of 16 as quantize_input does,
// one thread a block. A code times its scale has six significant bits, so BF16 holds it exactly.
extern "C" __global__ void serve(const void *x, int brief, float factor, u64 blocks, int cols, const float *factors,
                                 float divisor, u16 *out) {
    u64 block = thread_of_grid();
    if (block >= blocks) return;
    const float *by = factors + block % (cols / 16) * 16;
    float value[16], top = 0;
    for (int i = 0; i < 16; i++) {
        value[i] = at(x, brief, block * 16 + i) * factor * by[i];
        top = fmaxf(top, fabsf(value[i]));
    }
    float scale = e4m3_value(e4m3(fminf(divisor * (top * (1.0f / 6.0f)), 448.0f)));
    const float magnitudes[8] = {0.0f, 0.5f, 1.0f, 1.5f, 2.0f, 3.0f, 4.0f, 6.0f};
    float step = scale / divisor;
    for (int i = 0; i < 16; i++) {
        u32 code = scale == 0 ? 0 : e2m1(value[i] / step);
        float served = magnitudes[code & 7] * scale;
        out[block * 16 + i] = shortened(code & 8 ? -served : served);
    }
}

extern "C" __global__ void diagonal(const float *x, int n, float *out) {
    int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i < n) out[i] = x[(u64)i * n + i];
}

// Maxima and sums of squares by column; gridDim.y parts of the rows, whose sums the host adds in order.
extern "C" __global__ void columns(const void *x, int brief, float factor, int rows, int cols, u32 *amax,
                                   double *squares) {
    int column = blockIdx.x * blockDim.x + threadIdx.x;
    if (column >= cols) return;
    int part = (rows + gridDim.y - 1) / gridDim.y, first = blockIdx.y * part;
    int last = min(rows, first + part);
    float top = 0;
    double sum = 0;
    for (int row = first; row < last; row++) {
        float value = at(x, brief, (u64)row * cols + column) * factor;
        top = fmaxf(top, fabsf(value));
        sum += (double)value * value;
    }
    atomicMax(amax + column, __float_as_uint(top));
    squares[(u64)blockIdx.y * cols + column] = sum;
}

// sums[2 * block] and the next: this block's share of |a - b|^2 and |b|^2.
extern "C" __global__ void distance(const void *a, int a_brief, float a_factor, const void *b, int b_brief,
                                    float b_factor, u64 n, double *sums) {
    __shared__ double error[256], norm[256];
    double e = 0, s = 0;
    u64 stride = (u64)gridDim.x * blockDim.x;
    for (u64 i = thread_of_grid(); i < n; i += stride) {
        float value_of_b = at(b, b_brief, i) * b_factor;
        double difference = at(a, a_brief, i) * a_factor - value_of_b, value = value_of_b;
        e += difference * difference;
        s += value * value;
    }
    error[threadIdx.x] = e;
    norm[threadIdx.x] = s;
    for (int half = 128; half > 0; half /= 2) {
        __syncthreads();
        if (threadIdx.x < half) {
            error[threadIdx.x] += error[threadIdx.x + half];
            norm[threadIdx.x] += norm[threadIdx.x + half];
        }
    }
    if (threadIdx.x == 0) {
        sums[2 * blockIdx.x] = error[0];
        sums[2 * blockIdx.x + 1] = norm[0];
    }
}

__device__ __forceinline__ float e2m1_value(u32 code) {
    const float magnitudes[8] = {0.0f, 0.5f, 1.0f, 1.5f, 2.0f, 3.0f, 4.0f, 6.0f};
    float magnitude = magnitudes[code & 7];
    return code & 8 ? -magnitude : magnitude;
}

// The value of the nearest code: steps that are passed, added up.
__device__ __forceinline__ float nearest(float x) {
    float a = fabsf(x);
    float m = (a > 0.25f ? 0.5f : 0) + (a >= 0.75f ? 0.5f : 0) + (a > 1.25f ? 0.5f : 0) + (a >= 1.75f ? 0.5f : 0) +
              (a > 2.5f ? 1.0f : 0) + (a >= 3.5f ? 1.0f : 0) + (a > 5.0f ? 2.0f : 0);
    return copysignf(m, x);
}

// What codes stand for, over the global scale: six significant bits, which BF16 holds exactly. One thread a block of 16.
extern "C" __global__ void dequantize(const u64 *codes, const u8 *scales, u64 blocks, u16 *out) {
    u64 block = (u64)blockIdx.x * blockDim.x + threadIdx.x;
    if (block >= blocks) return;
    float scale = e4m3_value(scales[block]);
    u64 packed = codes[block];
    Sixteen values;
#pragma unroll
    for (int i = 0; i < 16; i++) values.at[i] = shortened(e2m1_value((u32)(packed >> (4 * i)) & 15) * scale);
    ((Sixteen *)out)[block] = values;
}

// A tree, as on the CPU.
__device__ __forceinline__ float total(float *terms) {
#pragma unroll
    for (int half = 8; half > 0; half /= 2)
#pragma unroll
        for (int i = 0; i < half; i++) terms[i] += terms[i + half];
    return terms[0];
}

__device__ __forceinline__ float loss(const float *w, const float *importance, float step) {
    float terms[16];
#pragma unroll
    for (int i = 0; i < 16; i++) {
        float error = w[i] - nearest(w[i] / step) * step;
        terms[i] = importance[i] * (error * error);
    }
    return total(terms);
}

__device__ __forceinline__ float clipped(const float *w, const float *importance, float limit) {
    float terms[16];
#pragma unroll
    for (int i = 0; i < 16; i++) {
        float beyond = fmaxf(fabsf(w[i]) - limit, 0.0f);
        terms[i] = importance[i] * (beyond * beyond);
    }
    return total(terms);
}

// The exact search of nvfp4/search.rs, operation by operation.
__device__ __forceinline__ u8 best_scale(const float *w, const float *importance, float global) {
    float top = 0;
#pragma unroll
    for (int i = 0; i < 16; i++) top = fmaxf(top, fabsf(w[i]));
    if (top == 0) return 0x38;
    int first = e4m3(fminf(fmaxf(top / (6.0f * global), 1.0f / 512), 448.0f));
    int best = first;
    float least = loss(w, importance, e4m3_value(first) * global);
    for (int byte = first + 1; byte <= min(first + 7, 0x7E); byte++) {
        float value = loss(w, importance, e4m3_value(byte) * global);
        if (value < least) best = byte, least = value;
    }
    for (int byte = first - 1; byte >= 1; byte--) {
        if (clipped(w, importance, 6.0f * e4m3_value(byte) * global) >= least) break;
        float value = loss(w, importance, e4m3_value(byte) * global);
        if (value < least) best = byte, least = value;
    }
    return (u8)best;
}

// One thread a block of 16; `cols` elements have their own importance.
extern "C" __global__ void quantize_searched(const float *w, const float *importance, int cols, u64 blocks,
                                             float global, u64 *codes, u8 *scales) {
    u64 block = (u64)blockIdx.x * blockDim.x + threadIdx.x;
    if (block >= blocks) return;
    const float *weights = importance + block % (cols / 16) * 16;
    float x[16], by[16];
#pragma unroll
    for (int i = 0; i < 16; i++) x[i] = w[block * 16 + i], by[i] = weights[i];
    u8 scale = best_scale(x, by, global);
    float step = e4m3_value(scale) * global;
    u64 packed = 0;
#pragma unroll
    for (int i = 0; i < 16; i++) packed |= (u64)e2m1(x[i] / step) << (4 * i);
    codes[block] = packed;
    scales[block] = scale;
}

// The lower triangle of h + lambda * I, rows and columns in order, and zeros above it: products over whole stripes of
// the factor read them.
extern "C" __global__ void damped(const float *h, const u32 *order, int n, float lambda, float *out) {
    // A grid may have more blocks in its first dimension than in the others.
    int column = blockIdx.y * blockDim.x + threadIdx.x, row = blockIdx.x;
    if (column >= n) return;
    float x = column > row ? 0.0f : h[(u64)order[row] * n + order[column]];
    out[(u64)row * n + column] = row == column ? x + lambda : x;
}

// Factors the diagonal tile at `first` in place, and writes the inverse of its factor, [width][width]. A pivot that is
// not positive is noted by its row. One block of 256 threads.
extern "C" __global__ void cholesky_tile(float *l, int n, int first, int width, float *inverse, int *failed) {
    __shared__ float a[TILE][TILE + 1], b[TILE][TILE + 1];
    float *tile = l + (u64)first * n + first;
    for (int i = threadIdx.x; i < width * width; i += blockDim.x) {
        int row = i / width, column = i % width;
        a[row][column] = column <= row ? tile[(u64)row * n + column] : 0.0f;
        b[row][column] = 0.0f;
    }
    for (int j = 0; j < width; j++) {
        __syncthreads();
        float pivot = a[j][j];
        if (!(pivot > 0 && pivot < INFINITY)) {
            if (threadIdx.x == 0) atomicMin(failed, first + j);
            return;
        }
        __syncthreads();
        float root = sqrtf(pivot);
        for (int i = j + threadIdx.x; i < width; i += blockDim.x) a[i][j] = i == j ? root : a[i][j] / root;
        __syncthreads();
        int rest = width - j - 1;
        for (int i = threadIdx.x; i < rest * rest; i += blockDim.x) {
            int row = j + 1 + i / rest, column = j + 1 + i % rest;
            if (column <= row) a[row][column] = __fmaf_rn(-a[row][j], a[column][j], a[row][column]);
        }
    }
    __syncthreads();
    if (threadIdx.x < width) {
        int c = threadIdx.x;
        for (int i = c; i < width; i++) {
            float sum = i == c ? 1.0f : 0.0f;
            for (int k = c; k < i; k++) sum = __fmaf_rn(-a[i][k], b[k][c], sum);
            b[i][c] = sum / a[i][i];
        }
    }
    __syncthreads();
    for (int i = threadIdx.x; i < width * width; i += blockDim.x) {
        int row = i / width, column = i % width;
        if (column <= row) tile[(u64)row * n + column] = a[row][column];
        inverse[row * width + column] = b[row][column];
    }
}

// Puts a panel [rows][width] at its place in a matrix of n columns.
extern "C" __global__ void place(const float *panel, u64 elements, int width, int n, float *to) {
    u64 i = thread_of_grid();
    if (i < elements) to[i / width * n + i % width] = panel[i];
}

// GPTQ's columns first .. first + width, from right to left, one thread a row (gptq.rs has the formula). `feedback`
// [width][rows] is what the columns further right contribute; `errors` [n][rows] takes this panel's errors.
extern "C" __global__ void round_panel(const float *l, int n, int first, int width, const float *w, int rows,
                                       const u32 *order, const float *feedback, float global, float *errors,
                                       u64 *codes, u8 *scales) {
    __shared__ float u[TILE][TILE], e[TILE][TILE];
    for (int i = threadIdx.x; i < width * width; i += TILE) {
        int row = i / width, column = i % width;
        u[row][column] = column <= row ? l[(u64)(first + row) * n + first + column] : 0.0f;
    }
    __syncthreads();
    int row = blockIdx.x * TILE + threadIdx.x;
    if (row >= rows) return;
    for (int start = width - 16; start >= 0; start -= 16) {
        float x[16], sum[16], target[16], importance[16];
#pragma unroll
        for (int i = 0; i < 16; i++) {
            x[i] = w[(u64)row * n + order[first + start + i]];
            sum[i] = feedback[(u64)(start + i) * rows + row];
        }
        for (int j = width - 1; j >= start + 16; j--) {
            float error = e[j][threadIdx.x];
#pragma unroll
            for (int i = 0; i < 16; i++) sum[i] = __fmaf_rn(error, u[j][start + i], sum[i]);
        }
#pragma unroll
        for (int i = 0; i < 16; i++) {
            float pivot = u[start + i][start + i];
            target[i] = x[i] + sum[i] / pivot;
            importance[i] = pivot * pivot;
        }
        u8 scale = best_scale(target, importance, global);
        float step = e4m3_value(scale) * global;
        u64 packed = 0;
#pragma unroll
        for (int i = 15; i >= 0; i--) {
            u32 code = e2m1((x[i] + sum[i] / u[start + i][start + i]) / step);
            float error = x[i] - e2m1_value(code) * step;
            e[start + i][threadIdx.x] = error;
            errors[(u64)(first + start + i) * rows + row] = error;
            packed |= (u64)code << (4 * (order[first + start + i] % 16));
#pragma unroll
            for (int k = 0; k < i; k++) sum[k] = __fmaf_rn(error, u[start + i][start + k], sum[k]);
        }
        u64 block = ((u64)row * n + order[first + start]) / 16;
        codes[block] = packed;
        scales[block] = scale;
    }
}
