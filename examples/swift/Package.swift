// swift-tools-version:6.0
import PackageDescription

let package = Package(
    name: "vae-decode",
    platforms: [.macOS(.v15), .iOS(.v18)],
    products: [.library(name: "VAE", targets: ["VAE"])],
    targets: [
        .target(name: "VAE"),
        .executableTarget(name: "vae-decode", dependencies: ["VAE"]),
    ],
    swiftLanguageModes: [.v5]
)
