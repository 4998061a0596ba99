// The members of an aggregate by name: what Python's keyword arguments fill, and in which order a program
// behind a pipe sends them. Written once, beside the aggregate.
#pragma once

#include <cstddef>
#include <tuple>
#include <type_traits>
#include <utility>

namespace gemq {

template <class Owner, class Type>
struct Field {
  using Value = Type;
  const char* name;
  Type Owner::* member;
};

// A member that a caller may leave out; its value is then the one in the aggregate's definition.
template <class Owner, class Type>
struct OptionalField {
  using Value = Type;
  const char* name;
  Type Owner::* member;
};

template <class Owner, class Type>
constexpr Field<Owner, Type> field(const char* name, Type Owner::* member) {
  return {name, member};
}
template <class Owner, class Type>
constexpr OptionalField<Owner, Type> optional_field(const char* name, Type Owner::* member) {
  return {name, member};
}

// A type's members, as `fields()` of the type names them.
template <class T>
using FieldsOf = decltype(T::fields());

struct AnyMember {
  template <class T>
  operator T() const;
};
template <class T, class Indices, class = void>
struct TakesMembers : std::false_type {};
template <class T, size_t... I>
struct TakesMembers<T, std::index_sequence<I...>, std::void_t<decltype(T{(void(I), AnyMember())...})>>
    : std::true_type {};

// True if `fields()` names as many members as the aggregate has.
template <class T>
constexpr bool names_all_members() {
  constexpr size_t kNamed = std::tuple_size_v<FieldsOf<T>>;
  return TakesMembers<T, std::make_index_sequence<kNamed>>::value &&
         !TakesMembers<T, std::make_index_sequence<kNamed + 1>>::value;
}

}  // namespace gemq
