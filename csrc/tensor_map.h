// What TMA is told of a matrix.
#pragma once

#include <cuda.h>

#include "checks.h"
#include "gemm_tiles.h"

namespace lora_init {

// Makes maps of row-major 16-bit matrices for one call of `op`, read or written in boxes of 64
// columns under the 128-byte swizzle.
struct TensorMaps {
  bool bf16;  // else fp16
  int device;
  const char* op;

  // A (rows, columns) matrix in boxes of box_rows × 64. Throws where TMA cannot address it.
  CUtensorMap operator()(const void* base, const char* name, int64_t rows, int64_t columns,
                         int64_t stride, int box_rows) const {
    check_pointer(base, device, 16, op, name);
    check(stride % 8 == 0 && stride >= columns, op, ": ", name, "'s rows are ", stride,
          " elements apart, expected a multiple of 8 from ", columns, " on");
    static const auto encode = encoder();
    check(encode != nullptr, op, ": this driver has no cuTensorMapEncodeTiled");
    const cuuint64_t sizes[] = {cuuint64_t(columns), cuuint64_t(rows)};
    const cuuint64_t strides[] = {cuuint64_t(stride) * 2};
    const cuuint32_t box[] = {gemm::kTileK, cuuint32_t(box_rows)}, steps[] = {1, 1};
    CUtensorMap map;
    const CUresult status =
        encode(&map, bf16 ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 : CU_TENSOR_MAP_DATA_TYPE_FLOAT16, 2,
               const_cast<void*>(base), sizes, strides, box, steps, CU_TENSOR_MAP_INTERLEAVE_NONE,
               CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
               CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
    check(status == CUDA_SUCCESS, op, ": no tensor map for ", name, " (", rows, ", ", columns,
          ") with rows ", stride, " elements apart: CUDA error ", int(status));
    return map;
  }

 private:
  // Looked up at run time: linking libcuda would make it a requirement for importing this module.
  static decltype(&cuTensorMapEncodeTiled) encoder() {
    void* found = nullptr;
    cudaDriverEntryPointQueryResult status{};
    const auto error = cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &found, 12000,
                                                        cudaEnableDefault, &status);
    return error == cudaSuccess && status == cudaDriverEntryPointSuccess
               ? reinterpret_cast<decltype(&cuTensorMapEncodeTiled)>(found)
               : nullptr;
  }
};

}  // namespace lora_init
