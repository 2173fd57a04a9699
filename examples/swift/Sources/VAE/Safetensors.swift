// Reads one tensor of float32 or float16 numbers from a .safetensors file. Nothing in the file is trusted.

import Foundation

public struct SafetensorsError: Error, CustomStringConvertible {
    public let description: String
}

public struct Tensor {
    public let shape: [Int]
    public let values: [Float]
    public let metadata: [String: String]

    /// The tensor called `name` of the file at `url`.
    public init(named name: String, of url: URL) throws {
        let file = try Data(contentsOf: url, options: .mappedIfSafe)
        guard file.count >= 8 else {
            throw SafetensorsError(description: "\(url.path): too short for a safetensors file")
        }
        let announced = file.prefix(8).reversed().reduce(UInt64(0)) { $0 << 8 | UInt64($1) }
        guard announced <= UInt64(file.count - 8) else {
            throw SafetensorsError(description: "\(url.path): its header is longer than the file")
        }
        let start = 8 + Int(announced)
        let header = try JSONSerialization.jsonObject(with: file.subdata(in: 8..<start)) as? [String: Any] ?? [:]
        guard let entry = header[name] as? [String: Any],
            let dtype = entry["dtype"] as? String,
            let shape = entry["shape"] as? [Int],
            let offsets = entry["data_offsets"] as? [Int], offsets.count == 2
        else {
            throw SafetensorsError(description: "\(url.path): no tensor \(name)")
        }
        guard let width = ["F32": 4, "F16": 2][dtype] else {
            throw SafetensorsError(description: "\(url.path): \(name) is \(dtype), wanted F32 or F16")
        }
        let size = try Tensor.bytes(of: shape, width: width, limit: file.count - start)
        guard offsets[0] >= 0, offsets[0] <= file.count - start - size, offsets[1] - offsets[0] == size else {
            throw SafetensorsError(description: "\(url.path): \(name) lies outside the file")
        }
        let bytes = file.subdata(in: (start + offsets[0])..<(start + offsets[0] + size))
        self.shape = shape
        self.values = width == 4 ? Tensor.float32(bytes) : Tensor.float16(bytes)
        self.metadata = header["__metadata__"] as? [String: String] ?? [:]
    }

    private static func bytes(of shape: [Int], width: Int, limit: Int) throws -> Int {
        var size = width
        for side in shape {
            let (product, overflow) = size.multipliedReportingOverflow(by: side)
            guard side > 0, !overflow, product <= limit else {
                throw SafetensorsError(description: "a shape \(shape) that the file can't hold")
            }
            size = product
        }
        return size
    }

    private static func float32(_ bytes: Data) -> [Float] {
        stride(from: 0, to: bytes.count, by: 4).map { i in
            let bits = (0..<4).reduce(UInt32(0)) { $0 | UInt32(bytes[i + $1]) << UInt32(8 * $1) }
            return Float(bitPattern: bits)
        }
    }

    /// By hand, since Float16 is missing on Intel Macs.
    private static func float16(_ bytes: Data) -> [Float] {
        stride(from: 0, to: bytes.count, by: 2).map { i in
            let bits = UInt32(bytes[i]) | UInt32(bytes[i + 1]) << 8
            let sign: Float = bits & 0x8000 == 0 ? 1 : -1
            let exponent = Int(bits >> 10 & 0x1F)
            let fraction = Float(bits & 0x3FF) / 1024
            if exponent == 0x1F { return fraction == 0 ? sign * Float.infinity : Float.nan }
            if exponent == 0 { return sign * fraction * 0x1p-14 }
            return sign * (1 + fraction) * Float(sign: .plus, exponent: exponent - 15, significand: 1)
        }
    }
}
