// Checks of plain numbers at the border to Python. Messages name the argument, what came and what is allowed.
#pragma once

#include <cstdint>
#include <limits>
#include <stdexcept>
#include <string>

namespace gemq {

[[noreturn]] inline void bad_value(const std::string& name, int64_t value, const std::string& allowed) {
  throw std::invalid_argument(name + " must be " + allowed + ", got " + std::to_string(value));
}

inline void check_range(const std::string& name, int64_t value, int64_t low, int64_t high) {
  if (value < low || value > high) {
    bad_value(name, value, "in " + std::to_string(low) + ".." + std::to_string(high));
  }
}

inline void check_at_least(const char* name, int64_t value, int64_t low) {
  if (value < low) bad_value(name, value, "at least " + std::to_string(low));
}

inline void check_pointer(const char* name, uintptr_t pointer) {
  if (pointer == 0)
    throw std::invalid_argument(std::string(name) + " must be an address, got a null pointer");
}

inline void check_multiple(const char* name, uintptr_t pointer, unsigned bytes) {
  if (pointer % bytes != 0) {
    throw std::invalid_argument(std::string(name) + " must be aligned to " + std::to_string(bytes) +
                                " bytes, got an address " + std::to_string(pointer % bytes) + " past one");
  }
}

// Group sizes are those of the format, and whole groups fill k.
inline void check_groups(const char* name, int64_t group_size, const char* k_name, int64_t k) {
  if (group_size != 32 && group_size != 64 && group_size != 128) bad_value(name, group_size, "32, 64 or 128");
  if (k <= 0 || k % group_size != 0) {
    bad_value(k_name, k, "a positive multiple of " + std::string(name) + "=" + std::to_string(group_size));
  }
}

inline void check_threads(int threads) { check_range("threads", threads, 1, 1024); }

inline void check_int32(const char* name, int64_t value) {
  check_range(name, value, 0, std::numeric_limits<int32_t>::max());
}

}  // namespace gemq
