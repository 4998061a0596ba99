// The launchers of the extension behind a pipe, so that they can run on another processor, or its emulator:
// calls come in on standard input, buffers and all, and results go out on standard output. Numbers are
// little-endian.
//
// Call:   name, count of arguments (u32), then for each 'i' and an int64, or 'b' with the buffer's address
// modulo 64
//         (u64), its size (u64) and its bytes.
// Answer: 0 and all buffers, or 1 (a value is wrong) or 2 (anything else) and a text.
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <stdexcept>
#include <string>
#include <tuple>
#include <vector>

#include "bind_gptq.h"
#include "bind_moe.h"
#include "bind_pack.h"
#include "moe_cpu/kernels.h"

namespace {

constexpr size_t kGuard = 256;
constexpr int kFill = 0xA5;
constexpr char kSetIsa[] = "set_cpu_isa:";

void get(void* to, size_t size) {
  if (size > 0 && std::fread(to, 1, size, stdin) != size) std::exit(0);  // the other side is gone
}

template <class T>
T get() {
  T value;
  get(&value, sizeof value);
  return value;
}

std::string get_text() {
  std::string text(get<uint32_t>(), '\0');
  get(&text[0], text.size());
  return text;
}

void put(const void* from, size_t size) {
  if (size > 0) std::fwrite(from, 1, size, stdout);
}

void put_text(char status, const std::string& text) {
  const uint32_t size = text.size();
  put(&status, 1);
  put(&size, sizeof size);
  put(text.data(), size);
}

// Memory at the same place within 64 bytes as the caller's, between bytes that must stay as they are.
class Guarded {
public:
  Guarded(size_t shift, size_t size) : memory_(new char[size + 3 * kGuard]), size_(size) {
    std::memset(memory_.get(), kFill, size + 3 * kGuard);
    const auto start = reinterpret_cast<uintptr_t>(memory_.get()) + kGuard;
    data_ = reinterpret_cast<char*>(start + (64 + shift - start % 64) % 64);
    get(data_, size);
  }
  char* data() const { return data_; }
  size_t size() const { return size_; }
  bool whole() const {
    for (const char* at = memory_.get(); at < memory_.get() + size_ + 3 * kGuard; ++at) {
      if ((at < data_ || at >= data_ + size_) && *at != static_cast<char>(kFill)) return false;
    }
    return true;
  }

private:
  std::unique_ptr<char[]> memory_;
  size_t size_;
  char* data_;
};

using Arguments = std::vector<int64_t>;

// A number, or the members of an aggregate in the order of its fields().
template <class T>
T take(const int64_t*& at) {
  if constexpr (std::is_arithmetic_v<T>) {
    return static_cast<T>(*at++);
  } else {
    T made{};
    std::apply(
        [&](auto... fields) {
          ((made.*fields.member = take<typename decltype(fields)::Value>(at)), ...);
        },
        T::fields());
    return made;
  }
}

template <class T>
void call(void (*launcher)(const T&), const Arguments& arguments) {
  const int64_t* at = arguments.data();
  const T given = take<T>(at);
  if (at != arguments.data() + arguments.size()) throw std::runtime_error("wrong number of arguments");
  launcher(given);
}

void run(const std::string& name, const Arguments& arguments) {
  using namespace gemq;
  if (name == "pack") return call(bind_pack, arguments);
  if (name == "unpack") return call(bind_unpack, arguments);
  if (name == "dequantize") return call(bind_dequantize, arguments);
  if (name == "repack") return call(bind_repack, arguments);
  if (name == "gptq_group") return call(bind_gptq_group, arguments);
  if (name == "descend_codes") return call(bind_descend_codes, arguments);
  if (name == "moe_gemm_cpu") return call(bind_moe_gemm, arguments);
  if (name == "moe_ffn_cpu") return call(bind_moe_ffn, arguments);
  if (name == "lowbit_gemm_cpu") return call(bind_lowbit_gemm, arguments);
  if (name.rfind(kSetIsa, 0) == 0) return set_kernels(name.c_str() + std::strlen(kSetIsa));
  throw std::runtime_error("no function " + name);
}

}  // namespace

int main() {
  for (;;) {
    const std::string name = get_text();
    Arguments arguments(get<uint32_t>());
    std::vector<Guarded> buffers;
    for (int64_t& argument : arguments) {
      if (get<char>() == 'i') {
        argument = get<int64_t>();
      } else {
        const auto shift = get<uint64_t>();
        const auto size = get<uint64_t>();
        buffers.emplace_back(shift, size);
        argument = reinterpret_cast<int64_t>(buffers.back().data());
      }
    }
    try {
      if (name == "cpu_isa") throw std::invalid_argument(gemq::kernels().name);
      run(name, arguments);
      for (const Guarded& buffer : buffers) {
        if (!buffer.whole()) throw std::runtime_error(name + " wrote outside a buffer");
      }
      const char good = 0;
      put(&good, 1);
      for (const Guarded& buffer : buffers) put(buffer.data(), buffer.size());
    } catch (const std::invalid_argument& error) {
      put_text(1, error.what());
    } catch (const std::exception& error) {
      put_text(2, error.what());
    }
    std::fflush(stdout);
  }
}
