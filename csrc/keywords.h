// Functions and classes of the extension that take an aggregate as keyword arguments: each name stands beside
// the member that it fills (fields.h), so no order of arguments has to agree.
//
// Functions are called by CPython's vector protocol: pybind11 compares every name with every other, which
// costs a small product a tenth of its time. Names that come in the order of fields() are recognised by their
// address.
#pragma once

#include <pybind11/pybind11.h>

#include <array>
#include <limits>
#include <string>

#include "fields.h"

namespace gemq {

[[noreturn]] inline void wrong_argument(const char* function, const std::string& what) {
  throw pybind11::type_error(std::string(function) + "(): " + what);
}

// One value for the member `name`; TypeError for another type or a number that the member cannot hold.
template <class Value>
Value from_python(const char* function, const char* name, PyObject* object) {
  const auto refuse = [&](const std::string& wanted) {
    wrong_argument(function, std::string(name) + " must be " + wanted + ", got " +
                                 std::string(pybind11::repr(pybind11::handle(object))));
  };
  if constexpr (std::is_same_v<Value, bool>) {
    if (!PyBool_Check(object)) refuse("a bool");
    return object == Py_True;
  } else if constexpr (std::is_integral_v<Value>) {
    const auto index = pybind11::reinterpret_steal<pybind11::object>(PyNumber_Index(object));
    if (!index) {
      PyErr_Clear();
      refuse("an integer");
    }
    int overflow = 0;
    if constexpr (std::is_signed_v<Value>) {
      const long long value = PyLong_AsLongLongAndOverflow(index.ptr(), &overflow);
      if (overflow != 0 || value < std::numeric_limits<Value>::min() ||
          value > std::numeric_limits<Value>::max())
        refuse("an integer of " + std::to_string(8 * sizeof(Value)) + " bits");
      return static_cast<Value>(value);
    } else {
      const unsigned long long value = PyLong_AsUnsignedLongLong(index.ptr());
      if (PyErr_Occurred() != nullptr) {
        PyErr_Clear();
        refuse("an address");
      }
      return static_cast<Value>(value);
    }
  } else if constexpr (std::is_floating_point_v<Value>) {
    const double value = PyFloat_AsDouble(object);
    if (PyErr_Occurred() != nullptr) {
      PyErr_Clear();
      refuse("a number");
    }
    return static_cast<Value>(value);
  } else {
    if (!pybind11::isinstance<Value>(object)) refuse(pybind11::type_id<Value>().substr(sizeof("gemq::") - 1));
    return pybind11::cast<const Value&>(pybind11::handle(object));
  }
}

// The arguments of one call, taken by name.
class Keywords {
public:
  Keywords(const char* function, PyObject* const* values, Py_ssize_t positional, PyObject* names)
      : function_(function),
        values_(values),
        names_(names),
        count_(names == nullptr ? 0 : PyTuple_GET_SIZE(names)) {
    if (positional != 0) wrong_argument(function, "arguments are given by name");
  }

  // The value of an interned name, or null.
  PyObject* take(PyObject* name) {
    Py_ssize_t at = next_ < count_ && this->name(next_) == name ? next_ : find(name);
    if (at < 0) return nullptr;
    next_ = at + 1;
    ++taken_;
    return values_[at];
  }

  template <class... Names>
  void all_taken(const Names&... known) const {
    if (taken_ == count_) return;
    for (Py_ssize_t at = 0; at < count_; ++at) {
      if (((PyUnicode_CompareWithASCIIString(name(at), known) != 0) && ...))
        wrong_argument(function_,
                       "no argument is named " + std::string(pybind11::str(pybind11::handle(name(at)))));
    }
  }

private:
  PyObject* name(Py_ssize_t at) const { return PyTuple_GET_ITEM(names_, at); }
  Py_ssize_t find(PyObject* wanted) const {
    for (Py_ssize_t at = 0; at < count_; ++at) {
      if (name(at) == wanted || PyUnicode_Compare(name(at), wanted) == 0) return at;
    }
    return -1;
  }

  const char* function_;
  PyObject* const* values_;
  PyObject* names_;
  Py_ssize_t count_, next_ = 0, taken_ = 0;
};

template <class Owner, class Type>
constexpr bool may_be_missing(const Field<Owner, Type>&) {
  return false;
}
template <class Owner, class Type>
constexpr bool may_be_missing(const OptionalField<Owner, Type>&) {
  return true;
}

template <class T>
T from_keywords(const char* function, PyObject* const* values, Py_ssize_t positional, PyObject* names) {
  Keywords given(function, values, positional, names);
  T made{};
  std::apply(
      [&](auto... fields) {
        static const std::array<PyObject*, sizeof...(fields)> kNames{
            PyUnicode_InternFromString(fields.name)...};
        size_t index = 0;
        const auto fill = [&](auto field) {
          PyObject* value = given.take(kNames[index++]);
          if (value != nullptr) {
            made.*field.member = from_python<typename decltype(field)::Value>(function, field.name, value);
          } else if (!may_be_missing(field)) {
            wrong_argument(function, std::string("argument ") + field.name + " is missing");
          }
        };
        (fill(fields), ...);
        given.all_taken(fields.name...);
      },
      T::fields());
  return made;
}

// "name($module, *, first, second=...)" and the text, from which inspect reads the signature.
template <class T>
std::string documented(const char* name, const char* doc) {
  std::string text = std::string(name) + "($module, *";
  std::apply(
      [&](auto... fields) {
        ((text += std::string(", ") + fields.name + (may_be_missing(fields) ? "=None" : "")), ...);
      },
      T::fields());
  return text + ")\n--\n\n" + doc;
}

// A Python function around `made(aggregate)`, a Python object.
template <class T, PyObject* (*MADE)(const T&)>
struct Function {
  static inline std::string name, doc;

  static PyObject* call(PyObject*, PyObject* const* values, Py_ssize_t positional, PyObject* names) {
    try {
      return MADE(from_keywords<T>(name.c_str(), values, positional, names));
    } catch (pybind11::error_already_set& error) {
      error.restore();
    } catch (const pybind11::builtin_exception& error) {
      error.set_error();
    } catch (const std::invalid_argument& error) {
      PyErr_SetString(PyExc_ValueError, error.what());
    } catch (const std::bad_alloc&) {
      PyErr_NoMemory();
    } catch (const std::exception& error) {
      PyErr_SetString(PyExc_RuntimeError, error.what());
    }
    return nullptr;
  }

  static void add(pybind11::module_& module, const char* given_name, const char* given_doc) {
    static_assert(names_all_members<T>());
    name = given_name;
    doc = documented<T>(given_name, given_doc);
    static PyMethodDef definition{name.c_str(),
                                  reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(&call)),
                                  METH_FASTCALL | METH_KEYWORDS, doc.c_str()};
    const auto module_name = pybind11::str(module.attr("__name__"));
    module.attr(given_name) = pybind11::reinterpret_steal<pybind11::object>(
        PyCFunction_NewEx(&definition, module.ptr(), module_name.ptr()));
  }
};

template <class T, void (*BODY)(const T&)>
PyObject* run_unlocked(const T& call) {
  {
    const pybind11::gil_scoped_release unlocked;
    BODY(call);
  }
  Py_RETURN_NONE;
}
template <class T>
PyObject* as_object(const T& made) {
  return pybind11::cast(made).release().ptr();
}

// module.name(*, keywords): BODY(aggregate) without the interpreter lock.
template <class T, void (*BODY)(const T&)>
void define(pybind11::module_& module, const char* name, const char* doc) {
  Function<T, &run_unlocked<T, BODY>>::add(module, name, doc);
}

// module.name, and module.maker(*, keywords), which makes one.
template <class T>
void define_class(pybind11::module_& module, const char* name, const char* maker, const char* doc) {
  pybind11::class_<T>(module, name, doc);
  Function<T, &as_object<T>>::add(module, maker, doc);
}

}  // namespace gemq
