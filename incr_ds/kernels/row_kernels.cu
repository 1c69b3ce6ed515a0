// The row kernels for the device: one block per row, lanes merged by shuffles in a fixed order, no atomics.

#include "row_interface.cuh"

namespace incr_ds {

constexpr int LANES = 512, WARP = 32;

template <typename Value>
__device__ Value from_lane_below(const Value& mine, int offset) {
  constexpr int WORDS = sizeof(Value) / sizeof(float);
  float words[WORDS];
  memcpy(words, &mine, sizeof(Value));
#pragma unroll
  for (int i = 0; i < WORDS; ++i) words[i] = __shfl_down_sync(0xffffffffu, words[i], offset);
  Value other;
  memcpy(&other, words, sizeof(Value));
  return other;
}

template <typename Value>
__device__ Value warp_merged(Value mine, float inverse) {
#pragma unroll
  for (int offset = WARP / 2; offset; offset /= 2) mine.merge(from_lane_below(mine, offset), inverse);
  return mine;
}

// Two blocks on a multiprocessor leave a thread 64 registers.
template <typename Rows>
__global__ void __launch_bounds__(LANES, 2) row_kernel(const RowCall call) {
  using Value = typename Rows::Value;
  __shared__ Value warps[LANES / WARP];
  const float inverse = *call.inverse_temperature;
  const long long row = blockIdx.x;
  Value mine = warp_merged(Rows::lane(call, row, threadIdx.x, LANES), inverse);
  if (threadIdx.x % WARP == 0) warps[threadIdx.x / WARP] = mine;
  __syncthreads();
  if (threadIdx.x >= WARP) return;
  mine = threadIdx.x < LANES / WARP ? warps[threadIdx.x] : Value::empty();
  mine = warp_merged(mine, inverse);
  if (threadIdx.x == 0) mine.write(call, row);
}

template <typename Rows>
int each_row(const RowCall& call) {
  if (call.count == 0) return cudaSuccess;
  row_kernel<Rows><<<static_cast<unsigned>(call.count), LANES, 0, static_cast<cudaStream_t>(call.stream)>>>(call);
  return cudaGetLastError();
}

}  // namespace incr_ds

extern "C" const char* incr_ds_error(int error) { return cudaGetErrorString(static_cast<cudaError_t>(error)); }
