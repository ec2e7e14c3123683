// Loops over elements. All of them are limited by memory; sums are taken in F32, and values are rounded where
// the reference implementation rounds them.

// out[t] = table[ids[t]]; one block a token.
extern "C" __global__ void embed(const Element *table, const u32 *ids, int cols, Element *out) {
    const Element *from = table + (u64)ids[blockIdx.x] * cols;
    Element *to = out + (u64)blockIdx.x * cols;
    for (int i = threadIdx.x; i < cols; i += blockDim.x) to[i] = from[i];
}

// out = round(x / rms(x)) * weight; one block of 256 threads a row. Each thread's partial sum and the tree that
// adds them are fixed, so a row's result depends on nothing else.
extern "C" __global__ void rms_norm(const Element *x, const Element *weight, int cols, float eps, Element *out) {
    __shared__ float partial[256];
    const Element *row = x + (u64)blockIdx.x * cols;
    float sum = 0;
    for (int i = threadIdx.x; i < cols; i += 256) {
        float value = get(row[i]);
        sum += value * value;
    }
    partial[threadIdx.x] = sum;
    for (int half = 128; half > 0; half /= 2) {
        __syncthreads();
        if (threadIdx.x < half) partial[threadIdx.x] += partial[threadIdx.x + half];
    }
    __syncthreads();
    float scale = 1.0f / sqrtf(partial[0] / cols + eps);
    Element *to = out + (u64)blockIdx.x * cols;
    for (int i = threadIdx.x; i < cols; i += 256)
        to[i] = round_to_element(rounded(get(row[i]) * scale) * get(weight[i]));
}

// Rotates the halves of each head in place; one thread a pair. cos and sin hold [positions, dim / 2].
extern "C" __global__ void rope(Element *x, const Element *cos, const Element *sin, const u32 *rows, int dim, int cols,
                                u64 pairs) {
    u64 i = (u64)blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= pairs) return;
    int half = dim / 2;
    u64 token = i / (cols / 2);
    int in_row = i % (cols / 2), head = in_row / half, at = in_row % half;
    Element *low = x + token * cols + head * dim + at, *high = low + half;
    float c = get(cos[(u64)rows[token] * half + at]), s = get(sin[(u64)rows[token] * half + at]);
    float a = get(*low), b = get(*high);
    *low = round_to_element(rounded(a * c) - rounded(b * s));
    *high = round_to_element(rounded(b * c) + rounded(a * s));
}

// gate = round(silu(gate)) * up
extern "C" __global__ void silu_mul(Element *gate, const Element *up, u64 n) {
    u64 i = (u64)blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= n) return;
    float x = get(gate[i]);
    gate[i] = round_to_element(rounded(x / (1.0f + expf(-x))) * get(up[i]));
}

// x += y
extern "C" __global__ void add(Element *x, const Element *y, u64 n) {
    u64 i = (u64)blockIdx.x * blockDim.x + threadIdx.x;
    if (i < n) x[i] = round_to_element(get(x[i]) + get(y[i]));
}

// Every row of x += bias
extern "C" __global__ void add_bias(Element *x, const Element *bias, int cols, u64 n) {
    u64 i = (u64)blockIdx.x * blockDim.x + threadIdx.x;
    if (i < n) x[i] = round_to_element(get(x[i]) + get(bias[i % cols]));
}
