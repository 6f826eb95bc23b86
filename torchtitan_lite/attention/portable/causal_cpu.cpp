// Causal attention of documents on a CPU, forward and backward, for heads of HEAD_DIM features. For GCC.
//
// FlashAttention (https://arxiv.org/abs/2205.14135) for short documents. torch's kernel also computes scores that
// the causal mask hides, and needs a call for each document. This kernel takes all documents in one call. Its
// threads divide documents, heads and blocks of queries among them. All sums are in float32, whatever the dtype.
//
// native.py compiles this file for the CPU of the machine and fills in the arguments. kernels.py is the reference.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

typedef float Vec __attribute__((vector_size(64), aligned(4)));
typedef int32_t IntVec __attribute__((vector_size(64), aligned(4)));

constexpr int LANES = 16, K = HEAD_DIM;
constexpr int QUERIES = 64;   // The queries in a block.
constexpr int KEYS = 256;     // The keys in a block: the scores of a block stay in the second-level cache.
constexpr int CHUNK = 512;    // The queries of a forward task, which transposes each block of keys once.
static_assert(KEYS % QUERIES == 0 && CHUNK % QUERIES == 0, "every query sees a key in each block that it computes");
#ifdef __AVX512F__
constexpr int ROWS = 8;       // The rows of a register tile. With 2 vectors a row, sums fill half of 32 registers.
#else
constexpr int ROWS = 3;
#endif
constexpr int PADDED_QUERIES = (QUERIES + ROWS - 1) / ROWS * ROWS;

struct Bfloat16 { uint16_t bits; };

static inline float widen(float x) { return x; }
static inline float widen(Bfloat16 x) {
    uint32_t bits = uint32_t(x.bits) << 16;
    float wide;
    std::memcpy(&wide, &bits, 4);
    return wide;
}
static inline void narrow(float x, float& out) { out = x; }
static inline void narrow(float x, Bfloat16& out) {
    uint32_t bits;
    std::memcpy(&bits, &x, 4);
    // Round to the nearest bfloat16. From halfway between two, round to the even one. NaN stays NaN.
    out.bits = x != x ? 0x7fc0 : uint16_t((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

// A tensor [batch, token, head, K]. The stride of the last dimension is 1. Strides count elements.
struct View {
    void* data;
    int64_t row, token, head;
    template <typename T> T* at(int64_t b, int64_t s, int64_t h) const {
        return static_cast<T*>(data) + b * row + s * token + h * head;
    }
};

// Queries of one document for the heads of one key head (`group`). The document has the `n` tokens of batch row
// `row` from token `start` on. The queries start at token `first` of the document.
struct Task { int64_t row, start, n, group, first; };

// Compute C[rows, 16 * vecs] (+)= A[rows, depth] @ B[depth, 16 * vecs], with the sums in registers.
template <int rows, int vecs>
static inline void multiply_tile(int64_t depth, const float* a, int64_t a_row, int64_t a_step, const float* b,
                                 int64_t b_row, float* c, int64_t c_row, bool add) {
    Vec sums[rows][vecs] = {};
    for (int64_t d = 0; d < depth; ++d) {
        Vec right[vecs];
        for (int v = 0; v < vecs; ++v) right[v] = *reinterpret_cast<const Vec*>(b + d * b_row + v * LANES);
        for (int r = 0; r < rows; ++r)
            for (int v = 0; v < vecs; ++v) sums[r][v] += a[r * a_row + d * a_step] * right[v];
    }
    for (int r = 0; r < rows; ++r)
        for (int v = 0; v < vecs; ++v) {
            Vec* out = reinterpret_cast<Vec*>(c + r * c_row + v * LANES);
            *out = add ? *out + sums[r][v] : sums[r][v];
        }
}

template <int vecs>
static inline void multiply_columns(int64_t rows, int64_t depth, const float* a, int64_t a_row, int64_t a_step,
                                    const float* b, int64_t b_row, float* c, int64_t c_row, bool add) {
    int64_t r = 0;
    for (; r + ROWS <= rows; r += ROWS)
        multiply_tile<ROWS, vecs>(depth, a + r * a_row, a_row, a_step, b, b_row, c + r * c_row, c_row, add);
    for (; r < rows; ++r)
        multiply_tile<1, vecs>(depth, a + r * a_row, a_row, a_step, b, b_row, c + r * c_row, c_row, add);
}

// Compute C[rows, columns] (+)= A[rows, depth] @ B[depth, columns]. `columns` must be a multiple of LANES.
static void multiply(int64_t rows, int64_t columns, int64_t depth, const float* a, int64_t a_row, int64_t a_step,
                     const float* b, int64_t b_row, float* c, int64_t c_row, bool add) {
    int64_t col = 0;
    for (; col + 2 * LANES <= columns; col += 2 * LANES)
        multiply_columns<2>(rows, depth, a, a_row, a_step, b + col, b_row, c + col, c_row, add);
    for (; col < columns; col += LANES)
        multiply_columns<1>(rows, depth, a, a_row, a_step, b + col, b_row, c + col, c_row, add);
}

static inline Vec splat(float x) { return x - Vec{}; }

// Return e^x for x <= 0 with the precision of float32. e^x is 2^n * e^r, and e^r is the polynomial of Cephes'
// expf (https://www.netlib.org/cephes/).
static inline Vec exponential(Vec x) {
    x = x < splat(-87.0f) ? splat(-87.0f) : x;  // In this order of operands NaN stays NaN.
    const Vec shifter = splat(12582912.0f);  // 1.5 * 2^23: adding this number rounds to a whole number.
    Vec shifted = x * 1.44269504088896341f + shifter;
    Vec n = shifted - shifter;
    Vec r = x - n * 0.693359375f + n * 2.12194440e-4f;
    Vec p = splat(1.9875691500e-4f);
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * r * r + r + 1.0f;
    return (Vec)((IntVec)p + (((IntVec)shifted - (IntVec)shifter) << 23));
}

static inline float sum_of(Vec x) {
    float sum = 0;
    for (int i = 0; i < LANES; ++i) sum += x[i];
    return sum;
}

static inline int64_t padded(int64_t n, int64_t multiple) { return (n + multiple - 1) / multiple * multiple; }

template <typename T>
static void load_row(const T* from, float* to, float factor = 1) {
    for (int i = 0; i < K; ++i) to[i] = widen(from[i]) * factor;
}

template <typename T>
static void store_row(const float* from, T* to, float factor = 1) {
    for (int i = 0; i < K; ++i) narrow(from[i] * factor, to[i]);
}

// Load the rows [n, K] of one head of a tensor, from token `start` on.
template <typename T>
static void load_rows(const View& view, int64_t row, int64_t start, int64_t head, int64_t n, float* rows) {
    for (int64_t i = 0; i < n; ++i) load_row(view.at<T>(row, start + i, head), rows + i * K);
}
// Transpose rows [n, K] to columns [K, stride]. `width` columns are written, with zeros after the n-th column.
static void transpose(const float* rows, int64_t n, int64_t width, int64_t stride, float* columns) {
    for (int64_t i0 = 0; i0 < width; i0 += LANES)
        for (int f = 0; f < K; ++f)
            for (int64_t i = i0; i < i0 + LANES; ++i) columns[f * stride + i] = i < n ? rows[i * K + f] : 0;
}

// Replace the first `seen` scores of a row by e^(score - shift), and the other scores by 0. Return the sum.
static inline float exponentiate(float* scores, int64_t seen, int64_t width, float shift) {
    Vec sums = {};
    int64_t j = 0;
    for (; j + LANES <= seen; j += LANES) {
        Vec* p = reinterpret_cast<Vec*>(scores + j);
        *p = exponential(*p - shift);
        sums += *p;
    }
    if (j < seen) {
        Vec* p = reinterpret_cast<Vec*>(scores + j);
        *p = exponential(*p - shift);
        for (int i = int(seen - j); i < LANES; ++i) scores[j + i] = 0;
        sums += *p;
        j += LANES;
    }
    for (; j < width; ++j) scores[j] = 0;
    return sum_of(sums);
}

static inline float maximum(const float* scores, int64_t seen) {
    Vec most = splat(-INFINITY);
    int64_t j = 0;
    for (; j + LANES <= seen; j += LANES) {
        Vec x = *reinterpret_cast<const Vec*>(scores + j);
        most = x > most ? x : most;
    }
    float found = -INFINITY;
    for (int i = 0; i < LANES; ++i) found = std::max(found, most[i]);
    for (; j < seen; ++j) found = std::max(found, scores[j]);
    return found;
}

struct Problem {
    View q, k, v, out, dout, dq, dk, dv;
    float* lse;            // [batch, tokens, heads]
    const int64_t* table;  // [n_tiles, table_width]: row0, row1, q0, q1 of square causal tiles come first
    int64_t n_tiles, table_width, n_tokens, heads, groups, n_threads;
    float scale;
    float& lse_at(int64_t b, int64_t s, int64_t h) const { return lse[(b * n_tokens + s) * heads + h]; }
};

static std::vector<Task> tasks_of(const Problem& p, int64_t chunk) {
    std::vector<Task> tasks;
    for (int64_t t = 0; t < p.n_tiles; ++t) {
        const int64_t* tile = p.table + t * p.table_width;
        for (int64_t row = tile[0]; row < tile[1]; ++row)
            for (int64_t group = 0; group < p.groups; ++group)
                for (int64_t first = 0; first < tile[3] - tile[2]; first += chunk)
                    tasks.push_back({row, tile[2], tile[3] - tile[2], group, first});
    }
    return tasks;
}

template <typename T>
static void forward_task(const Problem& p, const Task& task) {
    constexpr int64_t BLOCK = PADDED_QUERIES * K;
    const int64_t last = std::min(task.first + CHUNK, task.n), repeats = p.heads / p.groups;
    const int64_t n_blocks = (last - task.first + QUERIES - 1) / QUERIES;
    // q and out hold all heads that share the keys, so that each block of keys is transposed only once.
    std::vector<float> q(repeats * n_blocks * BLOCK), out(repeats * n_blocks * BLOCK);
    std::vector<float> most(repeats * n_blocks * QUERIES, -INFINITY), sum(repeats * n_blocks * QUERIES);
    alignas(64) static thread_local float rows[KEYS * K], keys[K * KEYS], values[KEYS * K];
    alignas(64) static thread_local float scores[PADDED_QUERIES * KEYS];
    const auto each_block = [&](auto compute) {
        for (int64_t block = 0; block < repeats * n_blocks; ++block) {
            const int64_t s = task.first + block % n_blocks * QUERIES;
            compute(block, task.group * repeats + block / n_blocks, s, std::min<int64_t>(QUERIES, last - s));
        }
    };
    each_block([&](int64_t block, int64_t head, int64_t s, int64_t n) {
        for (int64_t i = 0; i < n; ++i)
            load_row(p.q.at<T>(task.row, task.start + s + i, head), &q[block * BLOCK + i * K], p.scale);
    });
    for (int64_t k0 = 0; k0 < last; k0 += KEYS) {
        const int64_t n_loaded = std::min<int64_t>(KEYS, last - k0);
        load_rows<T>(p.k, task.row, task.start + k0, task.group, n_loaded, rows);
        transpose(rows, n_loaded, padded(n_loaded, 2 * LANES), KEYS, keys);
        load_rows<T>(p.v, task.row, task.start + k0, task.group, n_loaded, values);
        each_block([&](int64_t block, int64_t, int64_t s, int64_t n) {
            if (k0 >= s + n) return;
            const int64_t n_rows = padded(n, ROWS);
            const int64_t n_keys = std::min<int64_t>(KEYS, s + n - k0), n_columns = padded(n_keys, 2 * LANES);
            multiply(n_rows, n_columns, K, &q[block * BLOCK], K, 1, keys, KEYS, scores, KEYS, false);
            for (int64_t i = 0; i < n; ++i) {
                const int64_t seen = std::min(n_keys, s + i + 1 - k0);
                float &max = most[block * QUERIES + i], &total = sum[block * QUERIES + i];
                const float shift = std::max(max, maximum(scores + i * KEYS, seen));
                const float kept = std::exp(max - shift);
                max = shift;
                total = total * kept + exponentiate(scores + i * KEYS, seen, n_columns, shift);
                if (kept != 1)
                    for (int f = 0; f < K; ++f) out[block * BLOCK + i * K + f] *= kept;
            }
            multiply(n_rows, K, n_keys, scores, KEYS, 1, values, K, &out[block * BLOCK], K, true);
        });
    }
    each_block([&](int64_t block, int64_t head, int64_t s, int64_t n) {
        for (int64_t i = 0; i < n; ++i) {
            const int64_t token = task.start + s + i;
            const float total = sum[block * QUERIES + i];
            store_row(&out[block * BLOCK + i * K], p.out.at<T>(task.row, token, head), 1 / total);
            p.lse_at(task.row, token, head) = most[block * QUERIES + i] + std::log(total);
        }
    });
}

template <typename T>
static void backward_task(const Problem& p, const Task& task) {
    const int64_t width = padded(task.n, 2 * LANES);
    std::vector<float> keys(task.n * K), key_columns(K * width), value_columns(K * width), rows(task.n * K);
    std::vector<float> dk(width * K), dv(width * K);
    load_rows<T>(p.k, task.row, task.start, task.group, task.n, keys.data());
    transpose(keys.data(), task.n, width, width, key_columns.data());
    load_rows<T>(p.v, task.row, task.start, task.group, task.n, rows.data());
    transpose(rows.data(), task.n, width, width, value_columns.data());
    alignas(64) static thread_local float q[PADDED_QUERIES * K], dout[PADDED_QUERIES * K], dq[PADDED_QUERIES * K];
    alignas(64) static thread_local float weights[PADDED_QUERIES * KEYS], dscores[PADDED_QUERIES * KEYS];
    float delta[QUERIES], out[K];
    const int64_t repeats = p.heads / p.groups;
    for (int64_t head = task.group * repeats; head < (task.group + 1) * repeats; ++head)
        for (int64_t s = 0; s < task.n; s += QUERIES) {
            const int64_t n = std::min<int64_t>(QUERIES, task.n - s), n_rows = padded(n, ROWS);
            for (int64_t i = 0; i < n; ++i) {
                const int64_t token = task.start + s + i;
                load_row(p.q.at<T>(task.row, token, head), q + i * K, p.scale);
                load_row(p.dout.at<T>(task.row, token, head), dout + i * K);
                load_row(p.out.at<T>(task.row, token, head), out);
                delta[i] = 0;
                for (int f = 0; f < K; ++f) delta[i] += out[f] * dout[i * K + f];
            }
            std::fill(dq, dq + n_rows * K, 0.0f);
            for (int64_t k0 = 0; k0 < s + n; k0 += KEYS) {
                const int64_t n_keys = std::min<int64_t>(KEYS, s + n - k0), n_columns = padded(n_keys, 2 * LANES);
                multiply(n_rows, n_columns, K, q, K, 1, key_columns.data() + k0, width, weights, KEYS, false);
                multiply(n_rows, n_columns, K, dout, K, 1, value_columns.data() + k0, width, dscores, KEYS, false);
                for (int64_t i = 0; i < n; ++i) {
                    const int64_t seen = std::min(n_keys, s + i + 1 - k0);
                    float* weight = weights + i * KEYS;
                    exponentiate(weight, seen, n_columns, p.lse_at(task.row, task.start + s + i, head));
                    for (int64_t j = 0; j < n_columns; ++j)
                        dscores[i * KEYS + j] = weight[j] * (dscores[i * KEYS + j] - delta[i]);
                }
                multiply(n_columns, K, n, weights, 1, KEYS, dout, K, dv.data() + k0 * K, K, true);
                multiply(n_columns, K, n, dscores, 1, KEYS, q, K, dk.data() + k0 * K, K, true);
                multiply(n_rows, K, n_keys, dscores, KEYS, 1, keys.data() + k0 * K, K, dq, K, true);
            }
            for (int64_t i = 0; i < n; ++i)
                store_row(dq + i * K, p.dq.at<T>(task.row, task.start + s + i, head), p.scale);
        }
    for (int64_t j = 0; j < task.n; ++j) {
        store_row(dk.data() + j * K, p.dk.at<T>(task.row, task.start + j, task.group));
        store_row(dv.data() + j * K, p.dv.at<T>(task.row, task.start + j, task.group));
    }
}

template <typename T>
static void run(const Problem& p, bool backward) {
    const std::vector<Task> tasks = tasks_of(p, backward ? INT64_MAX : CHUNK);
    const int64_t n_tasks = tasks.size();
#pragma omp parallel for schedule(dynamic) num_threads(p.n_threads)
    for (int64_t t = 0; t < n_tasks; ++t)
        if (backward) backward_task<T>(p, tasks[t]);
        else forward_task<T>(p, tasks[t]);
}

extern "C" void attend(const Problem* problem, int is_bfloat16, int backward) {
    if (is_bfloat16) run<Bfloat16>(*problem, backward);
    else run<float>(*problem, backward);
}
