// A decoder exported with `--io image`: latents of the diffusion model in, a picture out.

import CoreML
import CoreVideo
import Foundation

public struct VAEError: Error, CustomStringConvertible {
    public let description: String
}

public struct Decoder {
    private let url: URL
    private let metadata: [String: String]

    /// From an .mlpackage, which is compiled first, or from an .mlmodelc.
    public init(contentsOf url: URL) throws {
        self.url = url.pathExtension == "mlpackage" ? try MLModel.compileModel(at: url) : url
        let description = try MLModel(contentsOf: self.url).modelDescription
        self.metadata = description.metadata[.creatorDefinedKey] as? [String: String] ?? [:]
        guard metadata["mlx_vae.part"] == "decoder", metadata["mlx_vae.io"] == "image" else {
            throw VAEError(description: "\(url.path): not a decoder exported by mlx_vae.coreml with --io image")
        }
    }

    /// The picture of one latent (1, height, width, channels), as our latent files hold it.
    public func picture(of latent: Tensor) throws -> CVPixelBuffer {
        let channels = Int(try value("mlx_vae.latent_channels")) ?? 0
        let factor = Int(try value("mlx_vae.factor")) ?? 0
        guard latent.shape.count == 4, latent.shape[0] == 1, latent.shape[3] == channels else {
            throw VAEError(description: "latents of shape \(latent.shape), wanted [1, height, width, \(channels)]")
        }
        let (height, width) = (latent.shape[1], latent.shape[2])
        let model = try load(size: "\(width * factor)x\(height * factor)")
        let array = try MLMultiArray(shape: [1, channels, height, width].map { NSNumber(value: $0) }, dataType: .float32)
        let scaled = try diffusionLatents(latent, channels: channels)
        array.withUnsafeMutableBufferPointer(ofType: Float.self) { numbers, strides in
            for c in 0..<channels {
                for y in 0..<height {
                    for x in 0..<width {
                        let there = c * strides[1] + y * strides[2] + x * strides[3]
                        numbers[there] = scaled[(y * width + x) * channels + c]
                    }
                }
            }
        }
        let input = try MLDictionaryFeatureProvider(dictionary: [value("mlx_vae.input"): array])
        let output = try model.prediction(from: input)
        guard let picture = output.featureValue(for: try value("mlx_vae.output"))?.imageBufferValue else {
            throw VAEError(description: "the model gave no picture")
        }
        return picture
    }

    /// The function for pictures of a size: a package holds one for each.
    private func load(size: String) throws -> MLModel {
        let sizes = try list("mlx_vae.sizes")
        let functions = try list("mlx_vae.functions")
        guard let index = sizes.firstIndex(of: size), index < functions.count else {
            throw VAEError(description: "no function for \(size); the package has \(sizes.joined(separator: ", "))")
        }
        let configuration = MLModelConfiguration()
        if sizes.count > 1 { configuration.functionName = functions[index] }
        return try MLModel(contentsOf: url, configuration: configuration)
    }

    /// (z - shift) * scale, for latents of the autoencoder: the package undoes it.
    private func diffusionLatents(_ latent: Tensor, channels: Int) throws -> [Float] {
        if latent.metadata["scaled"] == "true" { return latent.values }
        let scale = try numbers("mlx_vae.scale", channels)
        let shift = try numbers("mlx_vae.shift", channels)
        return latent.values.enumerated().map { i, z in (z - shift[i % channels]) * scale[i % channels] }
    }

    private func value(_ key: String) throws -> String {
        guard let value = metadata[key] else {
            throw VAEError(description: "the package's metadata has no \(key)")
        }
        return value
    }

    private func list(_ key: String) throws -> [String] {
        try value(key).split(separator: ",").map(String.init)
    }

    /// One number for each channel, or one for all.
    private func numbers(_ key: String, _ channels: Int) throws -> [Float] {
        let numbers = try list(key).compactMap(Float.init)
        if numbers.count == 1 { return Array(repeating: numbers[0], count: channels) }
        guard numbers.count == channels else {
            throw VAEError(description: "\(key) has \(numbers.count) numbers for \(channels) channels")
        }
        return numbers
    }
}
