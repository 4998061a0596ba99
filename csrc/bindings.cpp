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

  module.def("pack", &bind_pack, Unlocked(), arg("device"), arg("src"), arg("dst"), arg("rows"), arg("k"),
             arg("bits"), arg("threads") = 1, arg("stream") = 0,
             "uint8 codes [rows, k] to packed rows of ceil(k * bits / 8) bytes.");
  module.def("unpack", &bind_unpack, Unlocked(), arg("device"), arg("src"), arg("dst"), arg("rows"), arg("k"),
             arg("bits"), arg("threads") = 1, arg("stream") = 0, "The inverse of pack.");
  module.def("dequantize", &bind_dequantize, Unlocked(), arg("device"), arg("src"), arg("meta"), arg("dst"),
             arg("rows"), arg("k"), arg("bits"), arg("group_size"), arg("out_dtype"), arg("threads") = 1,
             arg("stream") = 0, "Packed rows to q * s + m; out_dtype 0 float32, 1 float16, 2 bfloat16.");
  module.def("repack", &bind_repack, Unlocked(), arg("device"), arg("src_codes"), arg("src_meta"),
             arg("dst_codes"), arg("dst_meta"), arg("n"), arg("k"), arg("bits"), arg("group_size"),
             arg("layout"), arg("inverse") = false, arg("threads") = 1, arg("stream") = 0,
             "Canonical to layout 1 (cpu_tile) or 2 (gpu_tile), or back.");

  module.def("gptq_group", &bind_gptq_group, Unlocked(), arg("device"), arg("block"), arg("factor"),
             arg("bits"), arg("codes"), arg("meta"), arg("errors"), arg("matrices"), arg("n"), arg("group"),
             arg("clip"), arg("propagate_from"), arg("threads") = 1, arg("stream") = 0,
             "GPTQ's column loop inside one group; clip 0 none, 1 paper, 2 mse.");
  module.def("descend_codes", &bind_descend_codes, Unlocked(), arg("device"), arg("products"), arg("hessian"),
             arg("bits"), arg("meta"), arg("codes"), arg("matrices"), arg("n"), arg("group"),
             arg("threads") = 1, arg("stream") = 0,
             "Coordinate descent over the codes of one group, in place.");

  module.def(
      "advise_huge_pages",
      [](uintptr_t at, int64_t bytes) { advise_huge_pages(reinterpret_cast<void*>(at), bytes); }, arg("at"),
      arg("bytes"),
      "Ask the system for large pages under memory not yet written; does nothing where it cannot.");
  py::class_<StackAddress>(module, "StackAddress", "Addresses and sizes of the tensors of a packed stack.")
      .def(py::init<uintptr_t, uintptr_t, uintptr_t, uintptr_t, uintptr_t, int64_t, int64_t>(), arg("codes"),
           arg("meta"), arg("bits"), arg("offsets"), arg("meta_offsets"), arg("code_bytes"),
           arg("meta_elements"));
  module.def(
      "moe_gemm_cpu", &bind_moe_gemm, Unlocked(), arg("x"), arg("x_per_slot"), arg("stack"),
      arg("num_experts"), arg("topk_ids"), arg("topk_weights"), arg("out"), arg("tokens"), arg("top_k"),
      arg("k"), arg("n"), arg("group_size"), arg("type"), arg("precision"), arg("threads") = 1,
      "x times each token's experts; weighted and summed when topk_weights is not 0. Type of x and out: 0 "
      "float32, 1 float16, 2 bfloat16; precision of activations: 0 float32, 1 int16, 2 int8 a group.");
  module.def("moe_ffn_cpu", &bind_moe_ffn, Unlocked(), arg("x"), arg("gate_up"), arg("down"),
             arg("num_experts"), arg("topk_ids"), arg("topk_weights"), arg("out"), arg("tokens"),
             arg("top_k"), arg("hidden"), arg("intermediate"), arg("group_size"), arg("down_group_size"),
             arg("type"), arg("precision"), arg("threads") = 1,
             "gate + up, SiLU(gate) * up, down and the weighted sum.");
  module.def("lowbit_gemm_cpu", &bind_lowbit_gemm, Unlocked(), arg("x"), arg("qweight"), arg("meta"),
             arg("out"), arg("tokens"), arg("k"), arg("n"), arg("bits"), arg("group_size"), arg("type"),
             arg("precision"), arg("threads") = 1, "x [tokens, k] times one cpu_tile matrix [n, k].");

  py::class_<MatrixAddress>(module, "MatrixAddress", "A linear layer of a decode program.")
      .def(py::init<uintptr_t, uintptr_t, int, int, int, int64_t, uintptr_t, int>(), arg("weights"),
           arg("meta"), arg("bits"), arg("group_size"), arg("type"), arg("n"), arg("bias"), arg("out"));
  py::class_<AttentionAddress>(module, "AttentionAddress", "An attention of a decode program.")
      .def(py::init<int, int, int, int, int, int, int, int, uintptr_t, uintptr_t, int64_t, uintptr_t,
                    uintptr_t, int, int64_t, float, uintptr_t, uintptr_t, float>(),
           py::kw_only(), arg("query"), arg("key"), arg("value"), arg("out"), arg("heads"), arg("groups"),
           arg("dim"), arg("rotary"), arg("cosines"), arg("sines"), arg("positions"), arg("keys"),
           arg("values"), arg("type"), arg("slots"), arg("scale"), arg("query_norm"), arg("key_norm"),
           arg("eps"));
  py::class_<LatentAddress>(module, "LatentAddress", "A latent attention of a decode program.")
      .def(py::init<int, int, int, int, int, int, int, int, uintptr_t, uintptr_t, int, uintptr_t, float,
                    uintptr_t, uintptr_t, int64_t, bool, uintptr_t, uintptr_t, int, int64_t, float>(),
           py::kw_only(), arg("query"), arg("latent"), arg("out"), arg("heads"), arg("nope"), arg("rope"),
           arg("rank"), arg("v_dim"), arg("into"), arg("from_"), arg("expand_type"), arg("norm"), arg("eps"),
           arg("cosines"), arg("sines"), arg("positions"), arg("apart"), arg("latents"), arg("ropes"),
           arg("type"), arg("slots"), arg("scale"));
  py::class_<ExpertsAddress>(module, "ExpertsAddress", "A block of experts of a decode program.")
      .def(py::init<int, int, int, int, bool, bool, float, float, uintptr_t, int, int, int, StackAddress,
                    StackAddress, int, int, int, int>(),
           py::kw_only(), arg("logits"), arg("x"), arg("out"), arg("top_k"), arg("sigmoid"), arg("normalize"),
           arg("epsilon"), arg("scale"), arg("bias"), arg("group_score"), arg("groups"), arg("kept_groups"),
           arg("gate_up"), arg("down"), arg("experts"), arg("intermediate"), arg("group_size"),
           arg("down_group_size"));
  py::class_<Program>(
      module, "DecodeProgram",
      "A decode step as operations over numbered buffers [batch, width]; nothing is kept alive.")
      .def(py::init([](int64_t batch, int precision) {
             check_range("batch", batch, 1, 64);
             return std::make_unique<Program>(batch, check_precision(precision));
           }),
           arg("batch"), arg("precision"))
      .def("buffer", &bind_buffer, arg("width"), arg("external") = 0)
      .def("embed", &bind_embed, arg("table"), arg("type"), arg("tokens"), arg("out"))
      .def("norm", &bind_norm, arg("x"), arg("weight"), arg("eps"), arg("out"))
      .def("silu_mul", &bind_silu_mul, arg("gate"), arg("up"), arg("out"))
      .def("linear", &bind_linear, arg("x"), arg("matrices"), arg("onto") = false, arg("gate") = -1)
      .def("attend", &bind_attend, arg("attention"))
      .def("attend_latent", &bind_attend_latent, arg("attention"))
      .def("experts", &bind_experts, arg("experts"))
      .def("run", &bind_run, Unlocked(), arg("tokens"), arg("positions"), arg("starts"), arg("slot"),
           arg("threads") = 1)
      .def("measure", &Program::measure, arg("on"))
      .def("seconds", &Program::seconds);
}
