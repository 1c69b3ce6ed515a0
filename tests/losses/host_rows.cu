// The row kernels' arithmetic on the host, behind the same C functions: each row by LANES lanes, merged as the device's warps are.

#include <vector>

#include "row_interface.cuh"

namespace incr_ds {

constexpr int LANES = 4;  // few, so that short rows are several vectors each

template <typename Rows>
int each_row(const RowCall& call) {
  for (long long row = 0; row < call.count; ++row) {
    std::vector<typename Rows::Value> lanes;
    for (int lane = 0; lane < LANES; ++lane) lanes.push_back(Rows::lane(call, row, lane, LANES));
    for (int offset = LANES / 2; offset; offset /= 2)
      for (int lane = 0; lane < offset; ++lane) lanes[lane].merge(lanes[lane + offset], *call.inverse_temperature);
    lanes[0].write(call, row);
  }
  return 0;
}

}  // namespace incr_ds

extern "C" const char* incr_ds_error(int) { return "wrong call"; }
