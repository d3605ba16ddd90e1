"""Files in, files out: model weights, tokenizers, data sets."""

from .digits import load_digits
from .gguf import GGUFFile, GGUFTensor, find_smollm2, read_gguf
from .hf_folder import HFFolder, read_hf_folder
from .images import load_images
from .moving_digits import load_moving_digits
from .ncnn import NcnnLayer, NcnnNetwork, find_realesrgan, read_ncnn
from .onnx import OnnxFile, OnnxNode, read_onnx
from .phonemes import phonemize
from .quantized import pack_gguf
from .texts import load_python_reference, load_texts
from .tokenizer import TextTokenizer, load_tokenizer, save_tokenizer
from .voice_tokenizer import VoiceTokenizer, find_voice, load_voice_tokenizer
from .wav import load_waveforms, read_wav, write_wav

__all__ = [
    "GGUFFile",
    "GGUFTensor",
    "HFFolder",
    "NcnnLayer",
    "NcnnNetwork",
    "OnnxFile",
    "OnnxNode",
    "TextTokenizer",
    "VoiceTokenizer",
    "find_realesrgan",
    "find_smollm2",
    "find_voice",
    "load_digits",
    "load_images",
    "load_moving_digits",
    "load_python_reference",
    "load_texts",
    "load_tokenizer",
    "load_voice_tokenizer",
    "load_waveforms",
    "pack_gguf",
    "phonemize",
    "read_gguf",
    "read_hf_folder",
    "read_ncnn",
    "read_onnx",
    "read_wav",
    "save_tokenizer",
    "write_wav",
]
