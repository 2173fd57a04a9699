// vae-decode PACKAGE LATENTS PICTURE: a latent file to a PNG, through Core ML.

import CoreImage
import CoreVideo
import Foundation
import VAE

func run(_ arguments: [String]) throws {
    guard arguments.count == 4 else {
        throw VAEError(description: "usage: vae-decode VAEDecoder.mlpackage latents.safetensors picture.png")
    }
    let decoder = try Decoder(contentsOf: URL(fileURLWithPath: arguments[1]))
    let latent = try Tensor(named: "latents", of: URL(fileURLWithPath: arguments[2]))
    let picture = CIImage(cvPixelBuffer: try decoder.picture(of: latent))
    guard let colours = CGColorSpace(name: CGColorSpace.sRGB) else {
        throw VAEError(description: "this system has no sRGB")
    }
    let target = URL(fileURLWithPath: arguments[3])
    try CIContext().writePNGRepresentation(of: picture, to: target, format: .RGBA8, colorSpace: colours)
}

do {
    try run(CommandLine.arguments)
} catch {
    FileHandle.standardError.write(Data("vae-decode: \(error)\n".utf8))
    exit(1)
}
