"""How a quantized weight is stored: tensor names, shapes, and bytes."""
