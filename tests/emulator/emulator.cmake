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

# A library a kernel file and a test with those that it calls: a mutation compiles no more than what its test needs.
file(GLOB EMULATED_SOURCES CONFIGURE_DEPENDS "${CUDA_KERNELS}/*.cu")
set_source_files_properties(${EMULATED_SOURCES} PROPERTIES LANGUAGE CXX)
set(EMULATED "")
foreach(source ${EMULATED_SOURCES})
  get_filename_component(name ${source} NAME_WE)
  add_library(emulated_${name} OBJECT ${source})
  target_compile_definitions(emulated_${name} PRIVATE PK_EMULATE)
  target_include_directories(emulated_${name} PRIVATE tests/emulator)
  target_include_directories(emulated_${name} SYSTEM PRIVATE "${CUDA_HEADERS}")
  target_compile_options(emulated_${name} PRIVATE -O1 -g1 -Wall -Wextra -Wno-unknown-pragmas -x c++)
  list(APPEND EMULATED $<TARGET_OBJECTS:emulated_${name}>)
endforeach()

function(add_emulated_test name)
  add_executable(test_${name} tests/emulator/test_${name}.cpp $<TARGET_OBJECTS:emulator> ${PK_CPU_OBJECTS})
  foreach(kernels ${ARGN})
    target_sources(test_${name} PRIVATE $<TARGET_OBJECTS:emulated_${kernels}>)
  endforeach()
  target_compile_definitions(test_${name} PRIVATE PK_EMULATE)
  target_include_directories(test_${name} PRIVATE tests/emulator)
  target_include_directories(test_${name} SYSTEM PRIVATE "${CUDA_HEADERS}")
  target_compile_options(test_${name} PRIVATE -O1 -g1 -Wall -Wextra -Wno-unknown-pragmas)
  target_link_libraries(test_${name} PRIVATE Threads::Threads ${CMAKE_DL_LIBS})
endfunction()
add_emulated_test(attention attention similarity token_cost token_cost_gradient)
add_emulated_test(implicit implicit)
add_emulated_test(plan plan)
add_emulated_test(points points points_product)
add_emulated_test(sinkhorn sinkhorn)

if(EMULATED_MODULE)
  find_package(Python 3.11 REQUIRED COMPONENTS Interpreter Development.Module)
  find_package(pybind11 CONFIG REQUIRED)
  pybind11_add_module(_emulated MODULE csrc/bindings.cpp $<TARGET_OBJECTS:emulator> ${EMULATED} ${PK_CPU_OBJECTS})
  target_link_libraries(_emulated PRIVATE Threads::Threads ${CMAKE_DL_LIBS})
  target_compile_definitions(
    _emulated PRIVATE PK_MODULE=_emulated PK_COMPILER="emulator" PK_HAVE_CUDA PK_CUDA_VERSION="emulated"
                      PK_CUDA_ARCHITECTURES="emulated")
endif()
