// Shared by the bindings, which are compiled as one file (CMakeLists.txt).
#pragma once

#include <cstdint>

namespace learndrop {

template <class T>
T* pointer(uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

}  // namespace learndrop
