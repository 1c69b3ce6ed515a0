// What one lane of a row kernel computes, for the device and for the host: the same text, so that tests without a GPU check values.
//
// incr_ds/kernels/rows.py says what the numbers mean. A row is walked by `lanes` lanes in vectors of 16 bytes; lanes keep their
// own sums, which are merged afterwards. Contraction into fused multiply-adds is written out and off otherwise: a student and a
// teacher with equal logits then give equal bits, whatever else the compiler does with either.

#pragma once

#include <cmath>
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#define INCR_DS_BOTH __host__ __device__ __forceinline__

namespace incr_ds {

constexpr float FAR = 1e30f;    // stands for minus infinity where 0 * infinity would follow
constexpr float NEAR = 0.5f;    // below it, logarithms and divergences are series
constexpr float LOG_2 = 0.693147180559945309f;
constexpr int NONE = 0, FORWARD = 1, REVERSE = 2, JSD = 3, SPARSE = 4;

// One call, as incr_ds/kernels/cuda_rows.py lays it out: all pointers are of the device, all fields 8 bytes.
struct RowCall {
  void* student;
  const void* teacher;
  float* result;
  const float* normalizers;
  const float* factors;
  const long long* labels;
  const unsigned char* live;
  const float* centres;
  const float* inverse_temperature;
  void* stream;
  long long student_stride, teacher_stride, count, columns;
  long long logits;  // 0 bf16, 1 fp16, 2 fp32
  long long kind, unit, write;
};

INCR_DS_BOTH float exponential(float x) {
#ifdef __CUDA_ARCH__
  return __expf(x);
#else
  return std::exp(x);
#endif
}

// At least -FAR; a value that is not a number stays one.
INCR_DS_BOTH float bounded(float x) { return x < -FAR ? -FAR : x; }

template <bool UNIT>
INCR_DS_BOTH float tempered_by(float x, float inverse) {
  return UNIT ? x : x * inverse;
}

// d + expm1(-d) for |d| < NEAR.
INCR_DS_BOTH float near_term(float d) {
  float series = fmaf(d, -1.0f / 362880, 1.0f / 40320);
  series = fmaf(-d, series, 1.0f / 5040);
  series = fmaf(-d, series, 1.0f / 720);
  series = fmaf(-d, series, 1.0f / 120);
  series = fmaf(-d, series, 1.0f / 24);
  series = fmaf(-d, series, 1.0f / 6);
  series = fmaf(-d, series, 0.5f);
  return d * d * series;
}

// A term of KL(q || p) with d = log q - log p: q * (d + expm1(-d)).
INCR_DS_BOTH float termwise(float q, float p, float d) {
  if (fabsf(d) < NEAR) return q * near_term(d);
  return (q > 0 ? q * d : 0.0f) + p - q;
}

struct Mixture {
  float over_p, over_q;  // log(p / m) and log(q / m), m = (p + q) / 2
};

INCR_DS_BOTH Mixture over_mixture(float d) {
  if (fabsf(d) < NEAR) {
    // log m lies log cosh(d / 2) above the mean of log p and log q; cosh(x) - 1 by its series.
    const float square = d * d / 4;
    float series = fmaf(square, 1.0f / 40320, 1.0f / 720);
    series = fmaf(square, series, 1.0f / 24);
    series = fmaf(square, series, 0.5f);
    const float rise = log1pf(square * series);
    return {-d / 2 - rise, d / 2 - rise};
  }
  const float bend = log1pf(exponential(-fabsf(d)));
  return {LOG_2 - (fmaxf(d, 0.0f) + bend), LOG_2 - (fmaxf(-d, 0.0f) + bend)};
}

template <typename T>
INCR_DS_BOTH float to_float(T value) {
  return static_cast<float>(value);
}

template <typename T>
INCR_DS_BOTH T rounded(float value);
template <>
INCR_DS_BOTH float rounded<float>(float value) {
  return value;
}
template <>
INCR_DS_BOTH __half rounded<__half>(float value) {
  return __float2half_rn(value);
}
template <>
INCR_DS_BOTH __nv_bfloat16 rounded<__nv_bfloat16>(float value) {
  return __float2bfloat16_rn(value);
}

// The logits that one access of 16 bytes moves.
template <typename T>
struct alignas(16) Vector {
  static constexpr int WIDTH = 16 / sizeof(T);
  T values[WIDTH];
};

template <typename T, int WIDTH>
INCR_DS_BOTH void load(const T* place, float (&values)[WIDTH]) {
  if constexpr (WIDTH == 1) {
    values[0] = to_float(*place);
  } else {
    const uint4 raw = *reinterpret_cast<const uint4*>(place);
    Vector<T> vector;
    memcpy(&vector, &raw, sizeof(raw));
#pragma unroll
    for (int i = 0; i < WIDTH; ++i) values[i] = to_float(vector.values[i]);
  }
}

template <typename T, int WIDTH>
INCR_DS_BOTH void store(T* place, const float (&values)[WIDTH]) {
  if constexpr (WIDTH == 1) {
    *place = rounded<T>(values[0]);
  } else {
    Vector<T> vector;
#pragma unroll
    for (int i = 0; i < WIDTH; ++i) vector.values[i] = rounded<T>(values[i]);
    uint4 raw;
    memcpy(&raw, &vector, sizeof(raw));
    *reinterpret_cast<uint4*>(place) = raw;
  }
}

// Calls step.run<WIDTH>(first) for the lane's share of `columns`: whole vectors, then single columns behind the last of them.
template <typename T, typename Step>
INCR_DS_BOTH void walk(long long columns, int lane, int lanes, Step& step) {
  constexpr int WIDTH = Vector<T>::WIDTH;
  const int whole = static_cast<int>(columns) / WIDTH * WIDTH;
  for (int first = lane * WIDTH; first < whole; first += lanes * WIDTH) step.template run<WIDTH>(first);
  for (int column = whole + lane; column < columns; column += lanes) step.template run<1>(column);
}

// Sums of one softmax relative to the highest logit so far; see the statistics in rows.py.
template <bool UNIT>
struct StudentSums {
  float high, total, tempered, weighted, logits;

  static INCR_DS_BOTH StudentSums empty() { return {-FAR, 0.0f, 0.0f, 0.0f, 0.0f}; }

  template <int WIDTH>
  INCR_DS_BOTH void add(const float (&z)[WIDTH], float inverse) {
    float top = high;
#pragma unroll
    for (int i = 0; i < WIDTH; ++i) top = fmaxf(top, z[i]);
    float more = 0, more_tempered = 0, more_weighted = 0, more_logits = 0;
#pragma unroll
    for (int i = 0; i < WIDTH; ++i) {
      const float below = bounded(z[i] - top), e = exponential(below);
      more += e;
      more_weighted = fmaf(e, below, more_weighted);
      more_logits += z[i];
      if (!UNIT) more_tempered += exponential(below * inverse);
    }
    merge({top, more, more_tempered, more_weighted, more_logits}, inverse);
  }

  INCR_DS_BOTH void merge(const StudentSums& other, float inverse) {
    const float top = fmaxf(high, other.high);
    const float mine = bounded(high - top), theirs = bounded(other.high - top);
    const float a = exponential(mine), b = exponential(theirs);
    weighted = fmaf(a, fmaf(mine, total, weighted), b * fmaf(theirs, other.total, other.weighted));
    total = fmaf(total, a, other.total * b);
    if (!UNIT) tempered = fmaf(tempered, exponential(mine * inverse), other.tempered * exponential(theirs * inverse));
    logits += other.logits;
    high = top;
  }
};

template <bool UNIT>
struct TeacherSums {
  float high, tempered;

  static INCR_DS_BOTH TeacherSums empty() { return {-FAR, 0.0f}; }

  template <int WIDTH>
  INCR_DS_BOTH void add(const float (&u)[WIDTH], float inverse) {
    float top = high;
#pragma unroll
    for (int i = 0; i < WIDTH; ++i) top = fmaxf(top, u[i]);
    float more = 0;
#pragma unroll
    for (int i = 0; i < WIDTH; ++i) more += exponential(tempered_by<UNIT>(bounded(u[i] - top), inverse));
    merge({top, more}, inverse);
  }

  INCR_DS_BOTH void merge(const TeacherSums& other, float inverse) {
    const float top = fmaxf(high, other.high);
    const float mine = tempered_by<UNIT>(bounded(high - top), inverse);
    const float theirs = tempered_by<UNIT>(bounded(other.high - top), inverse);
    tempered = fmaf(tempered, exponential(mine), other.tempered * exponential(theirs));
    high = top;
  }
};

template <bool UNIT>
struct RowSums {
  StudentSums<UNIT> student;
  TeacherSums<UNIT> teacher;

  static INCR_DS_BOTH RowSums empty() { return {StudentSums<UNIT>::empty(), TeacherSums<UNIT>::empty()}; }

  INCR_DS_BOTH void merge(const RowSums& other, float inverse) {
    student.merge(other.student, inverse);
    teacher.merge(other.teacher, inverse);
  }

  INCR_DS_BOTH void write(const RowCall& call, long long row) const {
    const float found[] = {student.high, student.total, UNIT ? student.total : student.tempered, student.logits,
                           student.weighted, teacher.high, teacher.tempered};
    for (int i = 0; i < 7; ++i) call.result[i * call.count + row] = found[i];
  }
};

template <typename T, bool TAUGHT, bool UNIT>
struct SumStep {
  const T *student, *teacher;
  float inverse;
  RowSums<UNIT> sums;

  template <int WIDTH>
  INCR_DS_BOTH void run(int first) {
    float logits[WIDTH];
    if (TAUGHT) {
      load(teacher + first, logits);
      sums.teacher.template add<WIDTH>(logits, inverse);
    }
    load(student + first, logits);
    sums.student.template add<WIDTH>(logits, inverse);
  }
};

template <typename T>
INCR_DS_BOTH T* student_row(const RowCall& call, long long row) {
  return static_cast<T*>(call.student) + row * call.student_stride;
}

template <typename T>
INCR_DS_BOTH const T* teacher_row(const RowCall& call, long long row) {
  return static_cast<const T*>(call.teacher) + row * call.teacher_stride;
}

template <typename T, bool TAUGHT, bool UNIT>
INCR_DS_BOTH RowSums<UNIT> lane_sums(const RowCall& call, long long row, int lane, int lanes) {
  SumStep<T, TAUGHT, UNIT> step{student_row<T>(call, row), TAUGHT ? teacher_row<T>(call, row) : nullptr,
                                *call.inverse_temperature, RowSums<UNIT>::empty()};
  walk<T>(call.columns, lane, lanes, step);
  return step.sums;
}

// Log-probabilities of a row at the temperature.
template <bool UNIT>
struct Softmaxes {
  float maximum, log_total, log_tempered, teacher_maximum, teacher_log_tempered, inverse;

  static INCR_DS_BOTH Softmaxes of(const RowCall& call, long long row) {
    const float* at = call.normalizers + row;
    const long long n = call.count;
    return {at[0], at[n], at[2 * n], at[3 * n], at[4 * n], *call.inverse_temperature};
  }

  INCR_DS_BOTH float log_p(float z) const { return tempered_by<UNIT>(z - maximum, inverse) - log_tempered; }
  INCR_DS_BOTH float log_q(float u) const { return tempered_by<UNIT>(u - teacher_maximum, inverse) - teacher_log_tempered; }
};

struct Centre {
  float first, second;

  static INCR_DS_BOTH Centre empty() { return {0.0f, 0.0f}; }
  INCR_DS_BOTH void merge(const Centre& other, float) { first += other.first, second += other.second; }

  INCR_DS_BOTH void write(const RowCall& call, long long row) const {
    call.result[row] = call.kind == JSD ? (first + second) / 2 : first;
    call.result[call.count + row] = first;
  }
};

template <typename T, int KIND, bool UNIT>
struct CentreStep {
  const T *student, *teacher;
  Softmaxes<UNIT> softmaxes;
  Centre sums;

  template <int WIDTH>
  INCR_DS_BOTH void run(int first) {
    float z[WIDTH], u[WIDTH];
    load(student + first, z);
    load(teacher + first, u);
#pragma unroll
    for (int i = 0; i < WIDTH; ++i) {
      const float log_p = softmaxes.log_p(z[i]), log_q = softmaxes.log_q(u[i]);
      const float p = exponential(log_p), q = exponential(log_q);
      if (KIND == REVERSE) {
        sums.first += termwise(p, q, log_p - log_q);
      } else {
        const Mixture over = over_mixture(log_q - log_p);
        const float mixture = (p + q) / 2;
        sums.first += termwise(p, mixture, over.over_p);
        sums.second += termwise(q, mixture, over.over_q);
      }
    }
  }
};

template <typename T, int KIND, bool UNIT>
INCR_DS_BOTH Centre lane_centre(const RowCall& call, long long row, int lane, int lanes) {
  CentreStep<T, KIND, UNIT> step{student_row<T>(call, row), teacher_row<T>(call, row), Softmaxes<UNIT>::of(call, row),
                                 Centre::empty()};
  walk<T>(call.columns, lane, lanes, step);
  return step.sums;
}

struct Divergence {
  float sum;

  static INCR_DS_BOTH Divergence empty() { return {0.0f}; }
  INCR_DS_BOTH void merge(const Divergence& other, float) { sum += other.sum; }
  INCR_DS_BOTH void write(const RowCall& call, long long row) const { call.result[row] = sum; }
};

template <typename T, int KIND, bool UNIT>
struct GradientStep {
  static constexpr bool TAUGHT = KIND == FORWARD || KIND == REVERSE || KIND == JSD;
  T* student;
  const T* teacher;
  Softmaxes<UNIT> softmaxes;
  float on_p, on_divergence, on_label, everywhere, centre;
  long long label;
  bool live, write;
  Divergence sums;

  template <int WIDTH>
  INCR_DS_BOTH void run(int first) {
    float z[WIDTH] = {}, u[WIDTH] = {};
    if (live) {
      load(student + first, z);
      if (TAUGHT) load(teacher + first, u);
#pragma unroll
      for (int i = 0; i < WIDTH; ++i) z[i] = gradient(z[i], u[i]);
      const long long place = label - first;
      if (place >= 0 && place < WIDTH) {
#pragma unroll
        for (int i = 0; i < WIDTH; ++i) z[i] -= i == place ? on_label : 0.0f;
      }
    }
    if (write) store(student + first, z);
  }

  // Of a column that is not the label's.
  INCR_DS_BOTH float gradient(float z, float u) {
    const float softmax = exponential(z - softmaxes.maximum - softmaxes.log_total);
    const float plain = fmaf(on_p, softmax, -everywhere);
    if (KIND == NONE) return plain;
    const float log_p = softmaxes.log_p(z);
    // At temperature 1 the two normalizers are the same bits.
    const float p = UNIT ? softmax : exponential(log_p);
    return fmaf(on_divergence, direction(p, log_p, u), plain);
  }

  INCR_DS_BOTH float direction(float p, float log_p, float u) {
    if (KIND == SPARSE) return p;
    const float log_q = softmaxes.log_q(u);
    if (KIND == FORWARD) {
      const float q = exponential(log_q);
      sums.sum += termwise(q, p, log_q - log_p);
      return p - q;
    }
    if (!(p > 0)) return 0.0f;
    if (KIND == REVERSE) return p * (log_p - log_q - centre);
    return p * (over_mixture(log_q - log_p).over_p - centre) / 2;
  }
};

template <typename T, int KIND, bool UNIT>
INCR_DS_BOTH Divergence lane_gradient(const RowCall& call, long long row, int lane, int lanes) {
  using Step = GradientStep<T, KIND, UNIT>;
  const float* factors = call.factors + row;
  const float centre = KIND == REVERSE || KIND == JSD ? call.centres[row] : 0.0f;
  Step step{student_row<T>(call, row), Step::TAUGHT ? teacher_row<T>(call, row) : nullptr, Softmaxes<UNIT>::of(call, row),
            factors[0], factors[call.count], factors[2 * call.count], factors[3 * call.count], centre,
            call.labels[row], call.live[row] != 0, call.write != 0, Divergence::empty()};
  walk<T>(call.columns, lane, lanes, step);
  return step.sums;
}

}  // namespace incr_ds
