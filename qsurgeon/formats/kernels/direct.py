"""The functions of product.cpp, operand.cpp and native.cpp that are called with plain numbers.

Their types are declared once: ctypes then converts an argument in a tenth of the time that an object of its own takes.
"""

import ctypes

_POINTER, _SIZE, _INT = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int


class Direct:
    """The functions of one library; their arguments are those of the C++ functions, addresses as int or None."""

    def __init__(self, functions: ctypes.CDLL) -> None:
        self.has_product = bool(functions.has_product())
        self.operand, self.product, self.dequantize = functions.operand, functions.product, functions.dequantize
        self.operand.argtypes = (*[_POINTER] * 5, *[_SIZE] * 3, _INT, ctypes.c_float, ctypes.c_uint32, _INT)
        self.product.argtypes = (*[_POINTER] * 4, _SIZE, *[_POINTER] * 2, *[_SIZE] * 3, _INT)
        self.dequantize.argtypes = (*[_POINTER] * 3, *[_SIZE] * 3, _POINTER, _SIZE, _INT)
        self.operand.restype = self.product.restype = self.dequantize.restype = None
