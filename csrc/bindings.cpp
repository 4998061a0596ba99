// gemq._C: what the extension offers. Pointers are integers; every function checks its numbers, releases the
// interpreter lock and calls one launcher.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "bind_decode.h"
#include "bind_gptq.h"
#include "bind_moe.h"
#include "bind_pack.h"
#include "checks.h"
#include "gemq/huge_pages.h"
#include "gemq/layouts.h"
#include "keywords.h"
#include "moe_cpu/kernels.h"

namespace py = pybind11;

namespace gemq {
namespace {

py::dict build_info() {
  py::dict info;
#ifdef GEMQ_CUDA_VERSION
  info["cuda"] = GEMQ_CUDA_VERSION;
#else
  info["cuda"] = py::none();
#endif
  info["archs"] = py::str(GEMQ_CUDA_ARCHS).attr("split")();
  info["compiler"] = GEMQ_COMPILER;
#ifdef _OPENMP
  info["openmp"] = true;
#else
  info["openmp"] = false;
#endif
#ifdef GEMQ_X86
  info["cpu_variants"] = py::make_tuple("avx512vnni", "avx512", "avx2vnni", "avx2", "portable");
#else
  info["cpu_variants"] = py::make_tuple("portable");
#endif
  info["tile_rows"] = py::dict(py::arg("cpu_tile") = kCpuRows, py::arg("gpu_tile") = kGpuRows);
  return info;
}

bool cuda_built() {
#ifdef GEMQ_CUDA_VERSION
  return true;
#else
  return false;
#endif
}

}  // namespace
}  // namespace gemq

PYBIND11_MODULE(_C, module) {
  using namespace gemq;
  using py::arg;
  using Unlocked = py::call_guard<py::gil_scoped_release>;
  module.doc() = "gemq's compiled kernels. All pointers are integers; device 0 is the CPU, 1 is CUDA.";

  module.def("cuda_built", &cuda_built, "Whether the CUDA kernels are in this build.");
  module.def("build_info", &build_info, "How this extension was built.");
  module.def("cpu_isa", [] { return kernels().name; }, "The variant of the CPU kernels in use.");
  module.def(
      "set_cpu_isa", [](const std::string& name) { set_kernels(name.c_str()); }, arg("name"),
      "Use another variant of the CPU kernels; ValueError if this CPU cannot run it.");

  define<PackCall, &bind_pack>(module, "pack",
                               "uint8 codes [rows, k] to packed rows of ceil(k * bits / 8) bytes.");
  define<PackCall, &bind_unpack>(module, "unpack", "The inverse of pack.");
  define<DequantizeCall, &bind_dequantize>(
      module, "dequantize", "Packed rows to q * s + m; out_dtype 0 float32, 1 float16, 2 bfloat16.");
  define<RepackCall, &bind_repack>(module, "repack",
                                   "Canonical to layout 1 (cpu_tile) or 2 (gpu_tile), or back.");
  define<RowsCall, &bind_read_rows>(module, "read_rows",
                                    "Some rows of a matrix in cpu_tile, or canonical, as float32 q * s + m.");
  define<GptqCall, &bind_gptq_group>(module, "gptq_group",
                                     "GPTQ's column loop inside one group; clip 0 none, 1 paper, 2 mse.");
  define<DescentCall, &bind_descend_codes>(module, "descend_codes",
                                           "Coordinate descent over the codes of one group, in place.");

  module.def(
      "advise_huge_pages",
      [](uintptr_t at, int64_t bytes, bool now) {
        advise_huge_pages(reinterpret_cast<void*>(at), bytes, now);
      },
      arg("at"), arg("bytes"), arg("now") = false,
      "Ask the system for large pages under memory not yet written, or move what is written now; does "
      "nothing where it cannot.");
  define_class<StackAddress>(module, "StackAddress", "stack_address",
                             "Addresses and sizes of the tensors of a packed stack.");
  define<MoeGemmCall, &bind_moe_gemm>(
      module, "moe_gemm_cpu",
      "x times each token's experts; weighted and summed when topk_weights is not 0. Type of x and out: 0 "
      "float32, 1 float16, 2 bfloat16; precision of activations: 0 float32, 1 int16, 2 int8 a group.");
  define<MoeFfnCall, &bind_moe_ffn>(module, "moe_ffn_cpu",
                                    "gate + up, SiLU(gate) * up, down and the weighted sum.");
  define<DenseCall, &bind_lowbit_gemm>(module, "lowbit_gemm_cpu",
                                       "x [tokens, k] times one cpu_tile matrix [n, k].");

  define_class<MatrixAddress>(module, "MatrixAddress", "matrix_address",
                              "A linear layer of a decode program.");
  define_class<AttentionAddress>(module, "AttentionAddress", "attention_address",
                                 "An attention of a decode program.");
  define_class<LatentAddress>(module, "LatentAddress", "latent_address",
                              "A latent attention of a decode program.");
  define_class<PartAddress>(module, "PartAddress", "part_address", "Where a gated delta net finds numbers.");
  define_class<DeltaAddress>(module, "DeltaAddress", "delta_address",
                             "A gated delta net of a decode program.");
  define_class<MambaAddress>(module, "MambaAddress", "mamba_address", "A Mamba-2 mixer of a decode program.");
  define_class<ExpertsAddress>(module, "ExpertsAddress", "experts_address",
                               "A block of experts of a decode program.");
  py::class_<Program>(
      module, "DecodeProgram",
      "A decode step as operations over numbered buffers [batch, width]; nothing is kept alive.")
      .def(py::init([](int64_t batch, int precision) {
             check_range("batch", batch, 1, 64);
             return std::make_unique<Program>(batch, check_precision(precision));
           }),
           arg("batch"), arg("precision"))
      .def("buffer", &bind_buffer, arg("width"), arg("external") = 0)
      .def("embed", &bind_embed, arg("table"), arg("type"), arg("tokens"), arg("scale"), arg("out"))
      .def("embed_packed", &bind_embed_packed, arg("codes"), arg("meta"), arg("bits"), arg("group_size"),
           arg("tiled"), arg("tokens"), arg("scale"), arg("out"))
      .def("norm", &bind_norm, arg("x"), arg("weight"), arg("eps"), arg("out"), arg("onto") = false,
           arg("scale") = 1.0f)
      .def("activate", &bind_activate, arg("gate"), arg("up"), arg("out"), arg("gated"), arg("slope"),
           arg("cubic"), arg("limit"), arg("shift"))
      .def("linear", &bind_linear, arg("x"), arg("matrices"), arg("onto") = false, arg("gate") = -1)
      .def("attend", &bind_attend, arg("attention"))
      .def("attend_latent", &bind_attend_latent, arg("attention"))
      .def("delta_net", &bind_delta_net, arg("delta"))
      .def("mamba", &bind_mamba, arg("mamba"))
      .def("experts", &bind_experts, arg("experts"))
      .def("run", &bind_run, Unlocked(), arg("tokens"), arg("positions"), arg("starts"), arg("slot"),
           arg("threads") = 1)
      .def("measure", &Program::measure, arg("on"))
      .def("seconds", &Program::seconds);
}
