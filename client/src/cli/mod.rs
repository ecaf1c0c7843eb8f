//! The `pagewalk` command: a thin verb for each RPC, for people and, with `--json`, for programs.
//!
//! Data flows one way: arguments -> request -> [`crate::Client`] -> response -> `render` or `json` -> `output`.

mod access;
mod address;
mod addresses;
mod attach;
mod batch;
mod connection;
mod doctor;
mod examples;
mod exit;
mod explain_fault;
mod extents;
mod gva_range;
mod json;
mod machines;
mod maps;
mod memory;
mod nested;
mod nested_gpa;
mod number;
mod output;
mod progress;
mod range;
mod regs;
mod render;
mod run_control;
mod save;
mod signals;
mod spaces;
mod translate;
mod usage;
mod vcpu;
mod vcpus;
mod walker;
mod walker_override;

use std::process::ExitCode;

use clap::{Parser, Subcommand};

use self::{connection::ConnectionArgs, exit::Failure, output::Output, vcpu::VcpuArgs};
use crate::{Client, Error};

/// Asks the pagewalk daemon what a guest virtual address means right now, and if nothing, why not.
#[derive(Debug, Parser)]
#[command(name = "pagewalk", version, after_help = examples::PAGEWALK, subcommand_required = true)]
struct Cli {
    #[command(flatten)]
    connection: ConnectionArgs,
    #[command(flatten)]
    vcpu: VcpuArgs,
    #[command(flatten)]
    output: output::OutputArgs,
    #[command(subcommand)]
    verb: Verb,
}

#[derive(Debug, Subcommand)]
enum Verb {
    /// Translate guest virtual addresses
    #[command(after_help = examples::TRANSLATE)]
    Translate(translate::Args),
    /// Translate many guest virtual addresses at once
    #[command(after_help = examples::BATCH)]
    Batch(batch::Args),
    /// Translate every guest virtual address of a range
    #[command(after_help = examples::RANGE)]
    Range(range::Args),
    /// Show the state of a vCPU's page walkers
    #[command(after_help = examples::WALKER)]
    Walker(walker::Args),
    /// Switch nested mode on or off
    #[command(after_help = examples::NESTED)]
    Nested(nested::Args),
    /// Translate a guest physical address of an L2
    #[command(after_help = examples::NESTED_GPA)]
    NestedGpa(nested_gpa::Args),
    /// List what an address space maps
    #[command(after_help = examples::MAPS)]
    Maps(maps::MapsArgs),
    /// Find the guest virtual addresses that lead to a guest physical one
    #[command(after_help = examples::FIND)]
    Find(maps::FindArgs),
    /// List the address spaces that a machine's vCPUs were seen in
    #[command(after_help = examples::SPACES)]
    Spaces,
    /// Translate an address in many address spaces: in which processes it is mapped, and where to
    #[command(after_help = examples::ACROSS)]
    Across(spaces::AcrossArgs),
    /// List the vCPUs of a machine
    #[command(after_help = examples::VCPUS)]
    Vcpus,
    /// Print a vCPU's registers, or write some
    #[command(after_help = examples::REGS)]
    Regs(regs::Args),
    /// Stop a vCPU until `resume`
    #[command(after_help = examples::PAUSE)]
    Pause,
    /// Let a stopped vCPU run on
    #[command(after_help = examples::RESUME)]
    Resume,
    /// Execute one instruction and leave the vCPU stopped
    #[command(after_help = examples::STEP)]
    Step,
    /// List the machines that the daemon serves
    #[command(after_help = examples::MACHINES)]
    Machines,
    /// Have the daemon take in a machine: attach to a guest, or make one
    #[command(after_help = examples::ATTACH)]
    Attach(attach::AttachArgs),
    /// Have the daemon let go of a machine; an attached guest goes on as it is
    #[command(after_help = examples::DETACH)]
    Detach(attach::DetachArgs),
    /// Save a machine as an image: its memory and registers, in two files
    #[command(after_help = examples::SAVE)]
    Save(save::Args),
    /// Read memory, by virtual or by physical address
    #[command(after_help = examples::READ)]
    Read(memory::ReadArgs),
    /// Write memory, by virtual or by physical address
    #[command(after_help = examples::WRITE)]
    Write(memory::WriteArgs),
    /// Explain a fault that somebody saw: #PF, nested page fault, EPT violation or misconfiguration
    #[command(after_help = examples::EXPLAIN_FAULT)]
    ExplainFault(explain_fault::Args),
    /// Check this host and the daemon, and say what to do
    #[command(after_help = examples::DOCTOR)]
    Doctor(doctor::Args),
}

/// What a verb works with: the way to the daemon, the vCPU that is meant, and where answers go.
struct Context {
    connection: ConnectionArgs,
    vcpu: VcpuArgs,
    output: Output,
}

impl Context {
    /// Connects. Verbs do so once their arguments are known to be sound.
    async fn client(&self) -> Result<Client, Error> {
        self.connection.connect().await
    }
}

/// Runs the command with the arguments of this process.
pub fn run() -> ExitCode {
    let cli = match Cli::try_parse() {
        Ok(cli) => cli,
        Err(error) => return usage::report(&error),
    };
    let output = Output::new(&cli.output);
    // Input and output may block this thread for long, and the daemon asks meanwhile whether somebody is there.
    let runtime = match tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build() {
        Ok(runtime) => runtime,
        Err(error) => return exit::report(&output, &Failure::Own(format!("cannot start: {error}"))),
    };
    match runtime.block_on(dispatch(cli, output)) {
        Ok(code) => code,
        Err(failure) => exit::report(&output, &failure),
    }
}

async fn dispatch(cli: Cli, output: Output) -> Result<ExitCode, Failure> {
    let context = Context { connection: cli.connection, vcpu: cli.vcpu, output };
    match cli.verb {
        Verb::Translate(args) => translate::run(&context, &args).await,
        Verb::Batch(args) => batch::run(&context, &args).await,
        Verb::Range(args) => range::run(&context, &args).await,
        Verb::Walker(args) => walker::run(&context, &args).await,
        Verb::Nested(args) => nested::run(&context, &args).await,
        Verb::NestedGpa(args) => nested_gpa::run(&context, &args).await,
        Verb::Maps(args) => maps::maps(&context, &args).await,
        Verb::Find(args) => maps::find(&context, &args).await,
        Verb::Spaces => spaces::spaces(&context).await,
        Verb::Across(args) => spaces::across(&context, &args).await,
        Verb::Vcpus => vcpus::run(&context).await,
        Verb::Regs(args) => regs::run(&context, &args).await,
        Verb::Pause => run_control::pause(&context).await,
        Verb::Resume => run_control::resume(&context).await,
        Verb::Step => run_control::step(&context).await,
        Verb::Machines => machines::run(&context).await,
        Verb::Read(args) => memory::read(&context, &args).await,
        Verb::Write(args) => memory::write(&context, &args).await,
        Verb::Attach(args) => attach::attach(&context, args).await,
        Verb::Detach(args) => attach::detach(&context, args).await,
        Verb::Save(args) => save::run(&context, &args).await,
        Verb::ExplainFault(args) => explain_fault::run(&context, &args).await,
        Verb::Doctor(args) => doctor::run(&context, &args).await,
    }
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory as _;

    #[test]
    fn the_command_line_is_consistent() {
        super::Cli::command().debug_assert();
    }
}
