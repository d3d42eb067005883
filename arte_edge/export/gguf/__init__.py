"""From a checkpoint to GGUF files: conversion, importance matrices, quantization."""
