// lora_init._C: what Python calls. Pointers and streams come as integers, so nothing of torch is
// needed here; which call a kernel can take is decided in lora_init/backends/cuda.py.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "checks.h"
#include "descend.h"
#include "dual_project.h"
#include "lora_linear.h"
#include "project.h"

namespace py = pybind11;
using namespace lora_init;

namespace {

const void* pointer(uintptr_t address) { return reinterpret_cast<const void*>(address); }

using Variant = std::tuple<int, int, bool>;
DescendVariant descend_variant(const Variant& variant) {
  const auto [ranks, element_bytes, streamed] = variant;
  return {ranks, element_bytes, streamed};
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.attr("interface") = LORA_INIT_INTERFACE;
  m.attr("archs") = LORA_INIT_CUDA_ARCHS;
  m.attr("cuda_version") = LORA_INIT_CUDA_VERSION;

  m.def("why_no_hopper", &why_no_hopper, py::arg("device"));

  m.def(
      "lora_linear",
      [](uintptr_t x, uintptr_t R, uintptr_t S, uintptr_t B, uintptr_t bias, uintptr_t y,
         std::array<int64_t, 4> sizes, std::array<int64_t, 5> strides, bool bf16, bool transposed,
         bool overlaps, int tile_n, int cluster, int device, uintptr_t stream) {
        const auto [m, n, k, r] = sizes;
        const auto [stride_x, stride_R, stride_S, stride_B, stride_y] = strides;
        lora_linear({pointer(x),
                     pointer(R),
                     pointer(S),
                     pointer(B),
                     pointer(bias),
                     const_cast<void*>(pointer(y)),
                     m,
                     n,
                     k,
                     r,
                     stride_x,
                     stride_R,
                     stride_S,
                     stride_B,
                     stride_y,
                     bf16,
                     transposed,
                     overlaps,
                     tile_n,
                     cluster,
                     device,
                     reinterpret_cast<cudaStream_t>(stream)});
      },
      py::kw_only(), py::arg("x"), py::arg("R"), py::arg("S"), py::arg("B"), py::arg("bias"),
      py::arg("y"), py::arg("sizes"), py::arg("strides"), py::arg("bf16"), py::arg("transposed"),
      py::arg("overlaps") = false, py::arg("tile_n") = 0, py::arg("cluster") = 0, py::arg("device"),
      py::arg("stream"));

  m.def(
      "project",
      [](uintptr_t x, uintptr_t f, uintptr_t c, std::array<int64_t, 3> sizes,
         std::array<int64_t, 4> strides, bool bf16, bool transposed_x, bool transposed_f,
         bool overlaps, double scale, int splits, int device, uintptr_t stream) {
        const auto [m, k, r] = sizes;
        const auto [stride_x, stride_f, stride_c_m, stride_c_r] = strides;
        project({pointer(x), pointer(f), const_cast<void*>(pointer(c)), m, k, r, stride_x, stride_f,
                 stride_c_m, stride_c_r, bf16, transposed_x, transposed_f, overlaps, float(scale),
                 splits, device, reinterpret_cast<cudaStream_t>(stream)});
      },
      py::kw_only(), py::arg("x"), py::arg("f"), py::arg("c"), py::arg("sizes"), py::arg("strides"),
      py::arg("bf16"), py::arg("transposed_x"), py::arg("transposed_f"), py::arg("overlaps"),
      py::arg("scale"), py::arg("splits") = 0, py::arg("device"), py::arg("stream"));

  m.def("why_no_dual_project", &why_no_dual_project, py::arg("device"));
  m.def(
      "dual_project_columns",
      [](int weight, int ranks, int parts) {
        return dual_project_columns(DualProjectWeight(weight), ranks, parts);
      },
      py::arg("weight"), py::arg("ranks"), py::arg("parts"));
  m.def(
      "dual_project",
      [](uintptr_t table, uintptr_t layers, int64_t count, int weight, int ranks, int parts,
         bool factors_are_half, double scale, bool half_targets, int device, uintptr_t stream) {
        dual_project({static_cast<const DualProjectLayer*>(pointer(table)),
                      static_cast<const DualProjectLayer*>(pointer(layers)), count,
                      DualProjectWeight(weight), ranks, parts, factors_are_half, float(scale),
                      half_targets, device, reinterpret_cast<cudaStream_t>(stream)});
      },
      py::kw_only(), py::arg("table"), py::arg("layers"), py::arg("count"), py::arg("weight"),
      py::arg("ranks"), py::arg("parts"), py::arg("factors_are_half"), py::arg("scale"),
      py::arg("half_targets"), py::arg("device"), py::arg("stream"));

  m.def(
      "why_no_descend",
      [](Variant variant, int device) { return why_no_descend(descend_variant(variant), device); },
      py::arg("variant"), py::arg("device"));
  m.def(
      "descend_capacity",
      [](Variant variant, int device) {
        return descend_capacity(descend_variant(variant), device);
      },
      py::arg("variant"), py::arg("device"));
  m.def(
      "descend_tiles",
      [](Variant variant) {
        const DescendSize tiles = descend_tiles(descend_variant(variant));
        return std::pair(tiles.rows, tiles.columns);
      },
      py::arg("variant"));
  m.def(
      "descend_region_bytes",
      [](Variant variant, std::pair<int, int> tiles, std::pair<int, int> blocks) {
        return descend_region_bytes(descend_variant(variant), {tiles.first, tiles.second},
                                    {blocks.first, blocks.second});
      },
      py::arg("variant"), py::arg("tiles"), py::arg("blocks"));
  m.def(
      "descend",
      [](Variant variant, uintptr_t layers, int64_t blocks, int64_t most_blocks, int64_t steps,
         uintptr_t schedule, uintptr_t workspace, int64_t region_bytes, uintptr_t counters,
         int64_t counter_bytes, std::pair<double, double> betas, double eps, bool bf16, bool adam,
         int ctas, int device, uintptr_t stream) {
        descend({descend_variant(variant), pointer(layers), blocks, most_blocks, steps,
                 static_cast<const float*>(pointer(schedule)),
                 const_cast<void*>(pointer(workspace)), region_bytes,
                 const_cast<void*>(pointer(counters)), counter_bytes, float(1 - betas.first),
                 float(betas.second), float(1 - betas.second), float(eps), bf16, adam, ctas, device,
                 reinterpret_cast<cudaStream_t>(stream)});
      },
      py::kw_only(), py::arg("variant"), py::arg("layers"), py::arg("blocks"),
      py::arg("most_blocks"), py::arg("steps"), py::arg("schedule"), py::arg("workspace"),
      py::arg("region_bytes"), py::arg("counters"), py::arg("counter_bytes"), py::arg("betas"),
      py::arg("eps"), py::arg("bf16"), py::arg("adam"), py::arg("ctas"), py::arg("device"),
      py::arg("stream"));
}
