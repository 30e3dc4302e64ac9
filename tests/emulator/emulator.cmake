# The CUDA kernels compiled for the CPU: one program a test, and with EMULATED_MODULE the Python module `_emulated`.
# CUDA_KERNELS: where the .cu files are; the mutation tests compile changed copies.
set(CUDA_KERNELS "${CMAKE_SOURCE_DIR}/csrc/cuda" CACHE PATH "Folder of the kernels that are emulated")
option(EMULATED_MODULE "Build the Python module _emulated, too" OFF)
find_path(CUDA_HEADERS cuda_bf16.h
          HINTS ENV CUDA_HOME ENV CUDA_PATH
          PATHS /usr/local/cuda /usr/local/cuda-13.0 /usr/local/cuda-12 /usr
          PATH_SUFFIXES include targets/x86_64-linux/include)
if(NOT CUDA_HEADERS)
  message(FATAL_ERROR "The emulator needs CUDA's headers (cuda_bf16.h). Install the CUDA toolkit or set -DCUDA_HEADERS.")
endif()

# The CPU kernels are only compared with here; tests/native sanitizes them.
target_compile_options(cpu_kernels PRIVATE -fno-sanitize=all)
target_compile_options(cpu_baseline PRIVATE -fno-sanitize=all)

# The emulator is never sanitized: it tells the sanitizers what its fibers do.
add_library(emulator OBJECT tests/emulator/emulator.cpp tests/emulator/tensor_cores.cpp)
target_include_directories(emulator SYSTEM PRIVATE "${CUDA_HEADERS}")
target_compile_options(emulator PRIVATE -O2 -Wall -Wextra -fno-sanitize=all)

file(GLOB EMULATED_SOURCES CONFIGURE_DEPENDS "${CUDA_KERNELS}/*.cu")
set_source_files_properties(${EMULATED_SOURCES} PROPERTIES LANGUAGE CXX)
add_library(emulated OBJECT ${EMULATED_SOURCES})
target_compile_definitions(emulated PRIVATE PK_EMULATE)
target_include_directories(emulated PRIVATE tests/emulator)
target_include_directories(emulated SYSTEM PRIVATE "${CUDA_HEADERS}")
target_compile_options(emulated PRIVATE -O1 -g1 -Wall -Wextra -Wno-unknown-pragmas -x c++)

file(GLOB EMULATED_TESTS CONFIGURE_DEPENDS tests/emulator/test_*.cpp)
foreach(source ${EMULATED_TESTS})
  get_filename_component(name ${source} NAME_WE)
  add_executable(${name} ${source} $<TARGET_OBJECTS:emulator> $<TARGET_OBJECTS:emulated> ${PK_CPU_OBJECTS})
  target_compile_definitions(${name} PRIVATE PK_EMULATE)
  target_include_directories(${name} PRIVATE tests/emulator)
  target_include_directories(${name} SYSTEM PRIVATE "${CUDA_HEADERS}")
  target_compile_options(${name} PRIVATE -O1 -g1 -Wall -Wextra -Wno-unknown-pragmas)
  target_link_libraries(${name} PRIVATE Threads::Threads ${CMAKE_DL_LIBS})
endforeach()

if(EMULATED_MODULE)
  find_package(Python 3.11 REQUIRED COMPONENTS Interpreter Development.Module)
  find_package(pybind11 CONFIG REQUIRED)
  pybind11_add_module(_emulated MODULE csrc/bindings.cpp $<TARGET_OBJECTS:emulator> $<TARGET_OBJECTS:emulated> ${PK_CPU_OBJECTS})
  target_link_libraries(_emulated PRIVATE Threads::Threads ${CMAKE_DL_LIBS})
  target_compile_definitions(
    _emulated PRIVATE PK_MODULE=_emulated PK_COMPILER="emulator" PK_HAVE_CUDA PK_CUDA_VERSION="emulated"
                      PK_CUDA_ARCHITECTURES="emulated")
endif()
