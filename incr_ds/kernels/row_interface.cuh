// The C functions of the row kernels, which map a call to a template. The including file defines
//
//   template <typename Rows> int each_row(const RowCall& call)
//
// to run Rows::lane and merge its values for every row. It returns 0 or an error number.

#pragma once

#include "row_arithmetic.cuh"

namespace incr_ds {

template <typename Rows>
int each_row(const RowCall& call);

constexpr int WRONG_CALL = 1;  // cudaErrorInvalidValue

template <typename T, bool TAUGHT, bool UNIT_>
struct StatisticsRows {
  static constexpr bool UNIT = UNIT_;
  using Value = RowSums<UNIT>;
  static INCR_DS_BOTH Value lane(const RowCall& call, long long row, int lane, int lanes) {
    return lane_sums<T, TAUGHT, UNIT>(call, row, lane, lanes);
  }
};

template <typename T, int KIND, bool UNIT>
struct CentreRows {
  using Value = Centre;
  static INCR_DS_BOTH Value lane(const RowCall& call, long long row, int lane, int lanes) {
    return lane_centre<T, KIND, UNIT>(call, row, lane, lanes);
  }
};

template <typename T, int KIND, bool UNIT>
struct GradientRows {
  using Value = Divergence;
  static INCR_DS_BOTH Value lane(const RowCall& call, long long row, int lane, int lanes) {
    return lane_gradient<T, KIND, UNIT>(call, row, lane, lanes);
  }
};

template <typename T, bool UNIT>
int statistics(const RowCall& call) {
  return call.teacher ? each_row<StatisticsRows<T, true, UNIT>>(call) : each_row<StatisticsRows<T, false, UNIT>>(call);
}

template <typename T, bool UNIT>
int centre(const RowCall& call) {
  if (call.kind == REVERSE) return each_row<CentreRows<T, REVERSE, UNIT>>(call);
  if (call.kind == JSD) return each_row<CentreRows<T, JSD, UNIT>>(call);
  return WRONG_CALL;
}

template <typename T, bool UNIT>
int gradient(const RowCall& call) {
  switch (call.kind) {
    case NONE: return each_row<GradientRows<T, NONE, UNIT>>(call);
    case FORWARD: return each_row<GradientRows<T, FORWARD, UNIT>>(call);
    case REVERSE: return each_row<GradientRows<T, REVERSE, UNIT>>(call);
    case JSD: return each_row<GradientRows<T, JSD, UNIT>>(call);
    case SPARSE: return each_row<GradientRows<T, SPARSE, UNIT>>(call);
    default: return WRONG_CALL;
  }
}

}  // namespace incr_ds

#define INCR_DS_ENTRY(NAME, FUNCTION)                                                          \
  extern "C" int NAME(const incr_ds::RowCall* call) {                                          \
    using namespace incr_ds;                                                                   \
    switch (call->logits) {                                                                    \
      case 0: return call->unit ? FUNCTION<__nv_bfloat16, true>(*call) : FUNCTION<__nv_bfloat16, false>(*call); \
      case 1: return call->unit ? FUNCTION<__half, true>(*call) : FUNCTION<__half, false>(*call); \
      case 2: return call->unit ? FUNCTION<float, true>(*call) : FUNCTION<float, false>(*call); \
      default: return WRONG_CALL;                                                              \
    }                                                                                          \
  }

INCR_DS_ENTRY(incr_ds_statistics, statistics)
INCR_DS_ENTRY(incr_ds_centre, centre)
INCR_DS_ENTRY(incr_ds_gradient, gradient)

extern "C" int incr_ds_call_bytes() { return sizeof(incr_ds::RowCall); }
