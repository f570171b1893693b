//! `understudy-initramfs`: build the demo guest and its initramfs by hand.
//!
//! Prints as JSON what went into the image and which kernel it belongs to.
#![forbid(unsafe_code)]

use std::path::PathBuf;

use anyhow::Result;
use clap::Parser;
use understudy_tests::initramfs::{DISK_MODULES, GUEST_MODULES, build_guest_image, build_guest_program};

/// Write the demo guest's initramfs.
#[derive(Parser)]
struct Arguments {
    /// Root file system with the kernel (boot/vmlinuz-*, lib/modules/*).
    #[arg(long)]
    root: PathBuf,
    /// The guest's program, statically linked; without it cargo builds it.
    #[arg(long)]
    program: Option<PathBuf>,
    /// Workspace to build the program in.
    #[arg(long, default_value = ".")]
    workspace: PathBuf,
    /// Where cargo builds.
    #[arg(long, default_value = "target/guest")]
    target_dir: PathBuf,
    /// A kernel module to include, with what it needs; may be repeated. Default: those that the demo uses.
    #[arg(long = "module")]
    modules: Vec<String>,
    /// With the modules that the guest with a disk needs too.
    #[arg(long)]
    disk: bool,
    /// The image to write.
    #[arg(long)]
    output: PathBuf,
}

fn main() -> Result<()> {
    let arguments = Arguments::parse();
    let program = match arguments.program {
        Some(program) => program,
        None => build_guest_program(&arguments.workspace, &std::path::absolute(&arguments.target_dir)?)?,
    };
    let mut modules: Vec<&str> = if arguments.modules.is_empty() {
        GUEST_MODULES.to_vec()
    } else {
        arguments.modules.iter().map(String::as_str).collect()
    };
    if arguments.disk {
        modules.extend(DISK_MODULES);
    }
    let image = build_guest_image(&arguments.root, &program, &modules, &arguments.output)?;
    println!("{}", serde_json::to_string_pretty(&image)?);
    Ok(())
}
