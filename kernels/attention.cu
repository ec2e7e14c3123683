// Causal attention inside each document, HEAD_DIM features a head, with running maxima and sums so that
// nothing grows with the square of a document's length. SOFTCAP and SINKS compile those in: without them the two
// arguments are not read.

#ifdef ELEMENT_BF16

// A block takes 64 queries of one head of one document; a warp takes 16 of them through tiles of keys with the tensor
// cores (m16n8k16). Limited by arithmetic. Beyond 256 features, two warps share 16 queries: each has half of the
// features, and they exchange their parts of the scores, so that what a thread keeps stays in registers.
constexpr int WARPS = HEAD_DIM <= 256 ? 1 : 2;
constexpr int DIM = (HEAD_DIM + 16 * WARPS - 1) / (16 * WARPS) * (16 * WARPS);
constexpr int PART = DIM / WARPS;
constexpr int THREADS = 128 * WARPS;
constexpr int KEYS = DIM <= 160 ? 64 : DIM <= 256 ? 32 : 16;
// Eight more columns shift each row by four banks, so that the fragments of eight rows do not collide.
constexpr int PITCH = DIM + 8;

__device__ __forceinline__ void mma(float (&c)[4], const u32 (&a)[4], u32 b0, u32 b1) {
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
                 : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

__device__ __forceinline__ u32 pack(float low, float high) {
    return round_to_element(low).bits | (u32)round_to_element(high).bits << 16;
}

// Two neighbouring elements of a row, or zeros outside of the document or the head.
__device__ __forceinline__ u32 pair_at(const Element *x, int row, int rows, u64 stride, int col) {
    return row < rows && col < HEAD_DIM ? *(const u32 *)(x + row * stride + col) : 0;
}

// Where two warps share queries: adds the other's part of the scores to this warp's. Both get the same sums.
__device__ __forceinline__ void add_the_others(float (&score)[KEYS / 8][4], int queries) {
    constexpr int SCORES = KEYS / 2;
    __shared__ float exchange[WARPS == 2 ? 2 : 1][4][SCORES][32];
    int half = threadIdx.x / 128 % WARPS, lane = threadIdx.x % 32;
#pragma unroll
    for (int i = 0; i < SCORES; i++) exchange[half][queries][i][lane] = score[i / 4][i % 4];
    __syncthreads();
#pragma unroll
    for (int i = 0; i < SCORES; i++) score[i / 4][i % 4] += exchange[(half + 1) % WARPS][queries][i][lane];
}

extern "C" __global__ void __launch_bounds__(THREADS)
    attention(const Element *q, const Element *k, const Element *v, const u32 *bounds, int heads, int kv_heads,
              float scale, int window, float cap, const Element *sinks, Element *out) {
    __shared__ __align__(16) u16 keys[KEYS * PITCH], values[KEYS * PITCH];
    int from = bounds[blockIdx.z], n = bounds[blockIdx.z + 1] - from;
    int first = blockIdx.x * 64;
    if (first >= n) return;
    int lane = threadIdx.x % 32, group = lane / 4, pair = lane % 4;
    int head = blockIdx.y, kv_head = head / (heads / kv_heads);
    u64 q_stride = (u64)heads * HEAD_DIM, kv_stride = (u64)kv_heads * HEAD_DIM;
    q += from * q_stride + head * HEAD_DIM;
    k += from * kv_stride + kv_head * HEAD_DIM;
    v += from * kv_stride + kv_head * HEAD_DIM;
    int queries = (int)threadIdx.x / 32, part = 0;
    if (WARPS == 2) queries %= 4, part = threadIdx.x / 128 * PART;
    int row[2] = {first + queries * 16 + group, first + queries * 16 + group + 8};

    u32 query[PART / 16][4];
    for (int c = 0; c < PART / 16; c++)
        for (int i = 0; i < 4; i++)
            query[c][i] = pair_at(q, row[i % 2], n, q_stride, part + c * 16 + pair * 2 + i / 2 * 8);

    // Scores are kept in units of log 2.
#ifdef SOFTCAP
    float inward = scale / cap, outward = cap * 1.44269504f;
    auto in_log2 = [&](float score) { return outward * tanhf(score * inward); };
#else
    float to_log2 = scale * 1.44269504f;
    auto in_log2 = [&](float score) { return score * to_log2; };
#endif
    float top[2] = {-INFINITY, -INFINITY}, sum[2] = {0, 0};
    float acc[PART / 8][4] = {};
    int last = min(first + 64, n);
    for (int tile = max(0, first + 1 - window) / KEYS * KEYS; tile < last; tile += KEYS) {
        __syncthreads();
        for (int i = threadIdx.x; i < KEYS * DIM / 2; i += THREADS) {
            int key = i / (DIM / 2), col = i % (DIM / 2) * 2;
            *(u32 *)&keys[key * PITCH + col] = pair_at(k, tile + key, n, kv_stride, col);
            *(u32 *)&values[key * PITCH + col] = pair_at(v, tile + key, n, kv_stride, col);
        }
        __syncthreads();

        float score[KEYS / 8][4] = {};
#pragma unroll
        for (int t = 0; t < KEYS / 8; t++)
#pragma unroll
            for (int c = 0; c < PART / 16; c++) {
                const u16 *at = &keys[(t * 8 + group) * PITCH + part + c * 16 + pair * 2];
                mma(score[t], query[c], *(const u32 *)at, *(const u32 *)(at + 8));
            }
        if (WARPS == 2) add_the_others(score, queries);

        float best[2] = {top[0], top[1]};
#pragma unroll
        for (int t = 0; t < KEYS / 8; t++)
#pragma unroll
            for (int i = 0; i < 4; i++) {
                int key = tile + t * 8 + pair * 2 + i % 2, query_row = row[i / 2];
                bool seen = key <= query_row && key > query_row - window;
                score[t][i] = seen ? in_log2(score[t][i]) : -INFINITY;
                best[i / 2] = fmaxf(best[i / 2], score[t][i]);
            }
        float base[2];
#pragma unroll
        for (int r = 0; r < 2; r++) {
            best[r] = fmaxf(best[r], __shfl_xor_sync(0xFFFFFFFF, best[r], 1));
            best[r] = fmaxf(best[r], __shfl_xor_sync(0xFFFFFFFF, best[r], 2));
            // A row that has seen nothing yet must not subtract infinity from infinity.
            base[r] = best[r] == -INFINITY ? 0 : best[r];
            float shrink = exp2f(top[r] - base[r]);
            sum[r] *= shrink;
#pragma unroll
            for (int c = 0; c < PART / 8; c++) {
                acc[c][2 * r] *= shrink;
                acc[c][2 * r + 1] *= shrink;
            }
            top[r] = best[r];
        }
#pragma unroll
        for (int t = 0; t < KEYS / 8; t++)
#pragma unroll
            for (int i = 0; i < 4; i++) {
                score[t][i] = exp2f(score[t][i] - base[i / 2]);
                sum[i / 2] += score[t][i];
            }

#pragma unroll
        for (int t = 0; t < KEYS / 16; t++) {
            u32 p[4] = {pack(score[2 * t][0], score[2 * t][1]), pack(score[2 * t][2], score[2 * t][3]),
                        pack(score[2 * t + 1][0], score[2 * t + 1][1]), pack(score[2 * t + 1][2], score[2 * t + 1][3])};
#pragma unroll
            for (int c = 0; c < PART / 8; c++) {
                // Two 8 x 8 matrices of values, transposed on their way: lane i names row i.
                u32 b0, b1;
                u32 at = (u32)__cvta_generic_to_shared(&values[(t * 16 + lane % 16) * PITCH + part + c * 8]);
                asm volatile("ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16 {%0,%1}, [%2];" : "=r"(b0), "=r"(b1) : "r"(at));
                mma(acc[c], p, b0, b1);
            }
        }
    }

#pragma unroll
    for (int r = 0; r < 2; r++) {
        sum[r] += __shfl_xor_sync(0xFFFFFFFF, sum[r], 1);
        sum[r] += __shfl_xor_sync(0xFFFFFFFF, sum[r], 2);
        if (row[r] >= n) continue;
#ifdef SINKS
        sum[r] += exp2f(get(sinks[head]) * 1.44269504f - top[r]);
#endif
        Element *to = out + (from + row[r]) * q_stride + head * HEAD_DIM;
        for (int c = 0; c < PART / 8; c++) {
            int col = part + c * 8 + pair * 2;
            if (col < HEAD_DIM) *(u32 *)(to + col) = pack(acc[c][2 * r] / sum[r], acc[c][2 * r + 1] / sum[r]);
        }
    }
}

#else

// F32: one block of 128 threads a query and head, plain arithmetic. For checkpoints whose activations are F32;
// exactness matters there, not speed.
extern "C" __global__ void __launch_bounds__(128)
    attention(const Element *q, const Element *k, const Element *v, const u32 *bounds, int heads, int kv_heads,
              float scale, int window, float cap, const Element *sinks, Element *out) {
    __shared__ float query[HEAD_DIM], weight[128], wide[128];
    int token = blockIdx.x, head = blockIdx.y, kv_head = head / (heads / kv_heads), document = 0;
    while (bounds[document + 1] <= token) document++;
    u64 q_stride = (u64)heads * HEAD_DIM, kv_stride = (u64)kv_heads * HEAD_DIM;
    for (int c = threadIdx.x; c < HEAD_DIM; c += 128) query[c] = q[token * q_stride + head * HEAD_DIM + c] * scale;
    float acc[(HEAD_DIM + 127) / 128] = {}, top = -INFINITY, sum = 0;
    for (int tile = max((int)bounds[document], token + 1 - window); tile <= token; tile += 128) {
        __syncthreads();
        int key = tile + threadIdx.x;
        float score = -INFINITY;
        if (key <= token) {
            score = 0;
            for (int c = 0; c < HEAD_DIM; c++) score += query[c] * k[key * kv_stride + kv_head * HEAD_DIM + c];
#ifdef SOFTCAP
            score = cap * tanhf(score / cap);
#endif
        }
        wide[threadIdx.x] = score;
        for (int half = 64; half > 0; half /= 2) {
            __syncthreads();
            if (threadIdx.x < half) wide[threadIdx.x] = fmaxf(wide[threadIdx.x], wide[threadIdx.x + half]);
        }
        __syncthreads();
        float best = fmaxf(top, wide[0]), shrink = expf(top - best);
        weight[threadIdx.x] = expf(score - best);
        __syncthreads();
        sum *= shrink;
        for (int i = 0; i < 128; i++) sum += weight[i];
        for (int j = 0; j < (HEAD_DIM + 127) / 128; j++) {
            int c = j * 128 + threadIdx.x;
            acc[j] *= shrink;
            for (int i = 0; c < HEAD_DIM && i < 128 && tile + i <= token; i++)
                acc[j] += weight[i] * v[(tile + i) * kv_stride + kv_head * HEAD_DIM + c];
        }
        top = best;
    }
#ifdef SINKS
    sum += expf(sinks[head] - top);
#endif
    for (int j = 0; j < (HEAD_DIM + 127) / 128; j++) {
        int c = j * 128 + threadIdx.x;
        if (c < HEAD_DIM) out[token * q_stride + head * HEAD_DIM + c] = acc[j] / sum;
    }
}

#endif
