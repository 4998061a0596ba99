// Element types of activations, outputs and unquantized weights, numbered as in the bindings.
#pragma once

namespace gemq {

enum Element : int { kElementFloat32 = 0, kElementFloat16 = 1, kElementBFloat16 = 2 };

constexpr int element_bytes(Element type) { return type == kElementFloat32 ? 4 : 2; }

}  // namespace gemq
