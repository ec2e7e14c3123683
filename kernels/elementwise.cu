// Loops over elements. All of them are limited by memory; sums are taken in F32, and values are rounded where
// the reference implementation rounds them.

// out[t] = table[ids[t]]; one block a token.
extern "C" __global__ void embed(const Element *table, const u32 *ids, int cols, Element *out) {
    const Element *from = table + (u64)ids[blockIdx.x] * cols;
    Element *to = out + (u64)blockIdx.x * cols;
    for (int i = threadIdx.x; i < cols; i += blockDim.x) to[i] = from[i];
}

// out = round(x / rms(x)) * weight; one block of 256 threads a row. Each thread's partial sum and the tree that adds
// them are fixed, so a row's result depends on nothing else. Rows are multiples of N.
template <int N> __device__ void rms_norm_row(const Element *x, const Element *weight, int cols, float eps, Element *out) {
    typedef Several<N> Part;
    __shared__ float partial[256];
    const Part *row = (const Part *)(x + (u64)blockIdx.x * cols);
    float sum = 0;
    for (int i = threadIdx.x; i < cols / N; i += 256) {
        Part part = row[i];
#pragma unroll
        for (int j = 0; j < N; j++) sum += get(part.at[j]) * get(part.at[j]);
    }
    partial[threadIdx.x] = sum;
    for (int half = 128; half > 0; half /= 2) {
        __syncthreads();
        if (threadIdx.x < half) partial[threadIdx.x] += partial[threadIdx.x + half];
    }
    __syncthreads();
    float scale = 1.0f / sqrtf(partial[0] / cols + eps);
    Part *to = (Part *)(out + (u64)blockIdx.x * cols);
    for (int i = threadIdx.x; i < cols / N; i += 256) {
        Part part = row[i], weights = ((const Part *)weight)[i];
#pragma unroll
        for (int j = 0; j < N; j++)
            part.at[j] = round_to_element(rounded(get(part.at[j]) * scale) * get(weights.at[j]));
        to[i] = part;
    }
}

extern "C" __global__ void rms_norm(const Element *x, const Element *weight, int cols, float eps, Element *out) {
    if (cols % PACK == 0)
        rms_norm_row<PACK>(x, weight, cols, eps, out);
    else
        rms_norm_row<1>(x, weight, cols, eps, out);
}

// Rotates the halves of each head in place; a thread takes N neighbouring pairs, of which half a head is a multiple.
// cos and sin hold [positions, dim / 2].
template <int N>
__device__ void rotate(Element *x, const Element *cos, const Element *sin, const u32 *rows, int dim, int cols, u64 pairs) {
    typedef Several<N> Part;
    u64 first = thread_of_grid() * N;
    if (first >= pairs) return;
    int half = dim / 2;
    u64 token = first / (cols / 2);
    int in_row = first % (cols / 2), head = in_row / half, at = in_row % half;
    Element *low = x + token * cols + head * dim + at, *high = low + half;
    Part a = *(Part *)low, b = *(Part *)high;
    Part c = *(const Part *)(cos + (u64)rows[token] * half + at), s = *(const Part *)(sin + (u64)rows[token] * half + at);
#pragma unroll
    for (int j = 0; j < N; j++) {
        float a_j = get(a.at[j]), b_j = get(b.at[j]), c_j = get(c.at[j]), s_j = get(s.at[j]);
        a.at[j] = round_to_element(rounded(a_j * c_j) - rounded(b_j * s_j));
        b.at[j] = round_to_element(rounded(b_j * c_j) + rounded(a_j * s_j));
    }
    *(Part *)low = a;
    *(Part *)high = b;
}

extern "C" __global__ void rope(Element *x, const Element *cos, const Element *sin, const u32 *rows, int dim, int cols,
                                u64 pairs) {
    if (dim / 2 % PACK == 0)
        rotate<PACK>(x, cos, sin, rows, dim, cols, pairs);
    else
        rotate<1>(x, cos, sin, rows, dim, cols, pairs);
}

// The two below walk over whole packs: an activation's memory ends with one, whatever its last element.

// gate = round(silu(gate)) * up
extern "C" __global__ void silu_mul(Pack *gate, const Pack *up, u64 packs) {
    u64 i = thread_of_grid();
    if (i >= packs) return;
    Pack gates = gate[i], ups = up[i];
#pragma unroll
    for (int j = 0; j < PACK; j++) {
        float x = get(gates.at[j]);
        gates.at[j] = round_to_element(rounded(x / (1.0f + expf(-x))) * get(ups.at[j]));
    }
    gate[i] = gates;
}

// x += y
extern "C" __global__ void add(Pack *x, const Pack *y, u64 packs) {
    u64 i = thread_of_grid();
    if (i >= packs) return;
    Pack sum = x[i], more = y[i];
#pragma unroll
    for (int j = 0; j < PACK; j++) sum.at[j] = round_to_element(get(sum.at[j]) + get(more.at[j]));
    x[i] = sum;
}

// Every row of x += bias
extern "C" __global__ void add_bias(Element *x, const Element *bias, int cols, u64 n) {
    u64 i = thread_of_grid();
    if (i < n) x[i] = round_to_element(get(x[i]) + get(bias[i % cols]));
}
