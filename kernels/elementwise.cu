// Loops over elements. All of them are limited by memory; sums are taken in F32, and values are rounded where
// the reference implementation rounds them.

// out[t] = table[ids[t]]; one block a token.
extern "C" __global__ void embed(const Element *table, const u32 *ids, int cols, Element *out) {
    const Element *from = table + (u64)ids[blockIdx.x] * cols;
    Element *to = out + (u64)blockIdx.x * cols;
    for (int i = threadIdx.x; i < cols; i += blockDim.x) to[i] = from[i];
}

// How a norm goes; NormKind in src/backend/operations.rs has the formula.
struct Norm {
    int centers, gamma, rounds_first;
    float eps;
};
enum { WEIGHT, ONE_PLUS, ONE_PLUS_ROUNDED, ONE };

__device__ __forceinline__ float factor_of(float weight, int gamma) {
    if (gamma == WEIGHT) return weight;
    return gamma == ONE_PLUS_ROUNDED ? rounded(1.0f + weight) : 1.0f + weight;
}

// The threads that share a piece of a row: a block of 256 adds their partial sums in a tree, a warp by shuffling. Both
// orders are fixed, so a piece's result depends on nothing else.
struct Block {
    static constexpr int THREADS = 256;
    __device__ __forceinline__ static int thread() { return threadIdx.x; }
    __device__ __forceinline__ static u64 piece() { return blockIdx.x; }
    __device__ static float sum(float x) {
        __shared__ float partial[256];
        __syncthreads();
        partial[threadIdx.x] = x;
        for (int half = 128; half > 0; half /= 2) {
            __syncthreads();
            if (threadIdx.x < half) partial[threadIdx.x] += partial[threadIdx.x + half];
        }
        __syncthreads();
        return partial[0];
    }
};
struct Warp {
    static constexpr int THREADS = 32;
    __device__ __forceinline__ static int thread() { return threadIdx.x % 32; }
    __device__ __forceinline__ static u64 piece() { return thread_of_grid() / 32; }
    __device__ static float sum(float x) {
        for (int half = 16; half > 0; half /= 2) x += __shfl_xor_sync(0xFFFFFFFF, x, half);
        return x;
    }
};

// Normalizes one piece of `dim` elements, a multiple of N. `own` pieces after each other have weights of their own.
template <typename Group, int N>
__device__ __forceinline__ void normalize(const Element *x, const Element *weight, const Element *bias, int dim, int own,
                                          Norm norm, Element *out) {
    typedef Several<N> Part;
    u64 piece = Group::piece();
    const Part *from = (const Part *)(x + piece * dim);
    float mean = 0, sum = 0;
    if (norm.centers) {
        for (int i = Group::thread(); i < dim / N; i += Group::THREADS) {
            Part part = from[i];
#pragma unroll
            for (int j = 0; j < N; j++) sum += get(part.at[j]);
        }
        mean = Group::sum(sum) / dim;
        sum = 0;
    }
    for (int i = Group::thread(); i < dim / N; i += Group::THREADS) {
        Part part = from[i];
#pragma unroll
        for (int j = 0; j < N; j++) {
            float value = get(part.at[j]) - mean;
            sum += value * value;
        }
    }
    float scale = 1.0f / sqrtf(Group::sum(sum) / dim + norm.eps);
    Part *to = (Part *)(out + piece * dim);
    u64 first = piece % own * dim / N;
    for (int i = Group::thread(); i < dim / N; i += Group::THREADS) {
        Part part = from[i], weights, biases;
        if (norm.gamma != ONE) weights = ((const Part *)weight)[first + i];
        if (bias) biases = ((const Part *)bias)[first + i];
#pragma unroll
        for (int j = 0; j < N; j++) {
            float value = (get(part.at[j]) - mean) * scale;
            if (norm.rounds_first) value = rounded(value);
            if (norm.gamma != ONE) value *= factor_of(get(weights.at[j]), norm.gamma);
            if (bias) value += get(biases.at[j]);
            part.at[j] = round_to_element(value);
        }
        to[i] = part;
    }
}

// Llama's norm, the common one; one block a row.
extern "C" __global__ void rms_norm(const Element *x, const Element *weight, int cols, float eps, Element *out) {
    Norm norm = {0, WEIGHT, 1, eps};
    if (cols % PACK == 0)
        normalize<Block, PACK>(x, weight, nullptr, cols, 1, norm, out);
    else
        normalize<Block, 1>(x, weight, nullptr, cols, 1, norm, out);
}

// Every norm; one block a piece. `out` may be `x`: a thread writes what it alone has read.
extern "C" __global__ void norm_long(const Element *x, const Element *weight, const Element *bias, int dim, int own,
                                int centers, int gamma, int rounds_first, float eps, Element *out) {
    Norm norm = {centers, gamma, rounds_first, eps};
    if (dim % PACK == 0)
        normalize<Block, PACK>(x, weight, bias, dim, own, norm, out);
    else
        normalize<Block, 1>(x, weight, bias, dim, own, norm, out);
}

// The same for short pieces, such as heads: one warp a piece.
extern "C" __global__ void norm_short(const Element *x, const Element *weight, const Element *bias, int dim, int own,
                                      int centers, int gamma, int rounds_first, float eps, Element *out, u64 pieces) {
    if (Warp::piece() >= pieces) return;
    Norm norm = {centers, gamma, rounds_first, eps};
    if (dim % PACK == 0)
        normalize<Warp, PACK>(x, weight, bias, dim, own, norm, out);
    else
        normalize<Warp, 1>(x, weight, bias, dim, own, norm, out);
}

// Turns pairs in place; a thread takes N neighbouring pairs, of which a head's pairs are a multiple. Pairs are features
// i and i + half of each head, or 2i and 2i + 1; features from 2 * half on stay. cos and sin hold [positions, half].
template <int N, bool INTERLEAVED, bool ONCE, typename Table>
__device__ __forceinline__ void rotate(Element *x, const Table *cos, const Table *sin, const u32 *rows, int dim,
                                       int half, int cols, u64 pairs) {
    typedef Several<N> Part;
    u64 first = thread_of_grid() * N;
    if (first >= pairs) return;
    int in_token = cols / dim * half;
    u64 token = first / in_token;
    int in_row = first % in_token, head = in_row / half, at = in_row % half;
    Element *low = x + token * cols + head * dim + (INTERLEAVED ? 2 * at : at), *high = low + (INTERLEAVED ? N : half);
    Part a = *(Part *)low, b = *(Part *)high;
    u64 entry = (u64)rows[token] * half + at;
    Several<N, Table> c = *(const Several<N, Table> *)(cos + entry), s = *(const Several<N, Table> *)(sin + entry);
#pragma unroll
    for (int j = 0; j < N; j++) {
        // Interleaved, the first half of the pairs lies in a, the others in b.
        Element &real = INTERLEAVED ? (2 * j < N ? a.at[2 * j % N] : b.at[2 * j % N]) : a.at[j];
        Element &imaginary = INTERLEAVED ? (2 * j + 1 < N ? a.at[(2 * j + 1) % N] : b.at[(2 * j + 1) % N]) : b.at[j];
        float a_j = get(real), b_j = get(imaginary), c_j = get(c.at[j]), s_j = get(s.at[j]);
        if (ONCE) {
            real = round_to_element(a_j * c_j - b_j * s_j);
            imaginary = round_to_element(b_j * c_j + a_j * s_j);
        } else {
            real = round_to_element(rounded(a_j * c_j) - rounded(b_j * s_j));
            imaginary = round_to_element(rounded(b_j * c_j) + rounded(a_j * s_j));
        }
    }
    *(Part *)low = a;
    *(Part *)high = b;
}

template <int N, typename Table>
__device__ __forceinline__ void rotate_as(Element *x, const Table *cos, const Table *sin, const u32 *rows, int dim,
                                          int half, int cols, int interleaved, int once, u64 pairs) {
    if (interleaved && once)
        rotate<N, true, true>(x, cos, sin, rows, dim, half, cols, pairs);
    else if (interleaved)
        rotate<N, true, false>(x, cos, sin, rows, dim, half, cols, pairs);
    else if (once)
        rotate<N, false, true>(x, cos, sin, rows, dim, half, cols, pairs);
    else
        rotate<N, false, false>(x, cos, sin, rows, dim, half, cols, pairs);
}

// `wide`: half a head's turned features, and a head, are whole packs.
extern "C" __global__ void rope(Element *x, const Element *cos, const Element *sin, const u32 *rows, int dim, int half,
                                int cols, int interleaved, int once, int wide, u64 pairs) {
    if (wide)
        rotate_as<PACK>(x, cos, sin, rows, dim, half, cols, interleaved, once, pairs);
    else
        rotate_as<1>(x, cos, sin, rows, dim, half, cols, interleaved, once, pairs);
}

// The same with tables in F32, whatever the elements.
extern "C" __global__ void rope_exact(Element *x, const float *cos, const float *sin, const u32 *rows, int dim, int half,
                                      int cols, int interleaved, int once, int wide, u64 pairs) {
    if (wide)
        rotate_as<PACK>(x, cos, sin, rows, dim, half, cols, interleaved, once, pairs);
    else
        rotate_as<1>(x, cos, sin, rows, dim, half, cols, interleaved, once, pairs);
}

enum { SILU, GELU_TANH, GELU, RELU2, XIELU };

// Activation in src/backend/operations.rs has the formulas; `p` and `n` are xIELU's.
__device__ __forceinline__ float activated(float x, int activation, float p, float n) {
    if (activation == SILU) return x / (1.0f + expf(-x));
    if (activation == GELU_TANH) return x / (1.0f + expf(-2.0f * (0.79788456f * (x + 0.044715f * x * x * x))));
    if (activation == GELU) return 0.5f * x * erfcf(-0.70710678f * x);
    if (activation == RELU2) {
        float above = x < 0 ? 0 : x;
        return above * above;
    }
    float half = rounded(0.5f * x);
    if (x > 0) return rounded(rounded(p * x) * x) + half;
    // -1e-6, as BF16 holds it.
    float least = x > -9.98377799987793e-07f ? -9.98377799987793e-07f : x;
    return rounded(rounded(rounded(expm1f(least)) - x) * n) + half;
}

// The next ones walk over whole packs: an activation's memory ends with one, whatever its last element.

// gate = round(silu(gate)) * up
extern "C" __global__ void silu_mul(Pack *gate, const Pack *up, u64 packs) {
    u64 i = thread_of_grid();
    if (i >= packs) return;
    Pack gates = gate[i], ups = up[i];
#pragma unroll
    for (int j = 0; j < PACK; j++)
        gates.at[j] = round_to_element(rounded(activated(get(gates.at[j]), SILU, 0, 0)) * get(ups.at[j]));
    gate[i] = gates;
}

// gate = round(activation(gate)) * up, or the activation alone where `up` is null
extern "C" __global__ void activate(Pack *gate, const Pack *up, int activation, float p, float n, u64 packs) {
    u64 i = thread_of_grid();
    if (i >= packs) return;
    Pack gates = gate[i], ups;
    if (up) ups = up[i];
#pragma unroll
    for (int j = 0; j < PACK; j++) {
        float value = rounded(activated(get(gates.at[j]), activation, p, n));
        gates.at[j] = round_to_element(up ? value * get(ups.at[j]) : value);
    }
    gate[i] = gates;
}

// x = x * round(sigmoid(gate))
extern "C" __global__ void gate_by_sigmoid(Pack *x, const Pack *gate, u64 packs) {
    u64 i = thread_of_grid();
    if (i >= packs) return;
    Pack values = x[i], gates = gate[i];
#pragma unroll
    for (int j = 0; j < PACK; j++) {
        float open = rounded(1.0f / (1.0f + expf(-get(gates.at[j]))));
        values.at[j] = round_to_element(get(values.at[j]) * open);
    }
    x[i] = values;
}

// x = x * factor
extern "C" __global__ void multiply(Pack *x, float factor, u64 packs) {
    u64 i = thread_of_grid();
    if (i >= packs) return;
    Pack values = x[i];
#pragma unroll
    for (int j = 0; j < PACK; j++) values.at[j] = round_to_element(get(values.at[j]) * factor);
    x[i] = values;
}

// x = cap * tanh(x / cap), rounded at each step
extern "C" __global__ void softcap(Pack *x, float cap, u64 packs) {
    u64 i = thread_of_grid();
    if (i >= packs) return;
    Pack values = x[i];
#pragma unroll
    for (int j = 0; j < PACK; j++)
        values.at[j] = round_to_element(rounded(tanhf(rounded(get(values.at[j]) / cap))) * cap);
    x[i] = values;
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

// Row t of x times factors[rows[t]]
extern "C" __global__ void multiply_rows(Element *x, const Element *factors, const u32 *rows, int cols, u64 n) {
    u64 i = thread_of_grid();
    if (i < n) x[i] = round_to_element(get(x[i]) * get(factors[rows[i / cols]]));
}

// Columns first .. first + part of each row of `all` columns, N at a time, of which all three are multiples.
template <int N>
__device__ __forceinline__ void copy_part(const Element *from, int first, int all, int part, Element *to, u64 n) {
    u64 i = thread_of_grid() * N;
    if (i < n) *(Several<N> *)(to + i) = *(const Several<N> *)(from + i / part * all + first + i % part);
}

extern "C" __global__ void copy_columns(const Element *from, int first, int all, int part, Element *to, int wide,
                                        u64 n) {
    if (wide)
        copy_part<PACK>(from, first, all, part, to, n);
    else
        copy_part<1>(from, first, all, part, to, n);
}
