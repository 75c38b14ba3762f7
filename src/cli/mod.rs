//! The command line: every command but `serve` is a client of the daemon's socket.

mod arguments;
mod client;
mod containers;
mod error;
mod images;
mod log;
mod progress;
mod run;
mod table;

use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use clap::{CommandFactory as _, Parser as _};

use crate::base::error::chain;
use crate::cli::arguments::{Arguments, Command, ConfigCommand, ImageCommand};
use crate::cli::client::Client;
use crate::cli::error::CliError;

/// What is done without a socket, given by the daemon's module, which this one must not know.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Local {
    /// Runs the daemon.
    pub(crate) serve: fn(Option<&Path>) -> Result<(), String>,
    /// Reads a configuration.
    pub(crate) check_config: fn(Option<&Path>) -> Result<(), String>,
    /// The commented default configuration.
    pub(crate) default_config: fn() -> String,
}

/// Where the daemon is when nobody says.
const DEFAULT_ADDRESS: &str = "/run/berth/berth.sock";

/// Runs the command line; returns its exit code.
pub(crate) fn main(local: &Local) -> ExitCode {
    let arguments = Arguments::parse();
    match run(arguments, local) {
        Ok(code) => code,
        Err(error) => {
            // Nobody is left to tell when stderr is closed.
            let _told = writeln!(std::io::stderr(), "berth: {}", chain(&error)).is_ok();
            ExitCode::FAILURE
        }
    }
}

fn run(arguments: Arguments, local: &Local) -> Result<ExitCode, CliError> {
    match arguments.command {
        Command::Serve { config } => {
            (local.serve)(config.as_deref()).map_err(CliError::Daemon)?;
        }
        Command::Config(ConfigCommand::Default) => print(&(local.default_config)())?,
        Command::Config(ConfigCommand::Check { file }) => {
            (local.check_config)(file.as_deref()).map_err(CliError::Daemon)?;
            print("the configuration is fine\n")?;
        }
        Command::Completions { shell } => {
            let mut script = Vec::new();
            clap_complete::generate(shell, &mut Arguments::command(), "berth", &mut script);
            print(&String::from_utf8_lossy(&script))?;
        }
        command => {
            let address = arguments
                .address
                .or_else(|| std::env::var_os("BERTH_ADDRESS").map(PathBuf::from))
                .unwrap_or_else(|| DEFAULT_ADDRESS.into());
            let runtime = tokio::runtime::Builder::new_current_thread()
                .enable_all()
                .build()
                .map_err(CliError::io("start the client"))?;
            return runtime.block_on(remote(&address, command));
        }
    }
    Ok(ExitCode::SUCCESS)
}

/// The commands that ask the daemon.
async fn remote(address: &Path, command: Command) -> Result<ExitCode, CliError> {
    if matches!(command, Command::Version) {
        print(concat!("berth ", env!("CARGO_PKG_VERSION"), "\n"))?;
    }
    let mut client = Client::connect(address).await?;
    match command {
        Command::Version => print(&client.version().await?)?,
        Command::Run(options) => return Box::pin(run::run(&mut client, options)).await,
        Command::Ps { all } => containers::list(&mut client, all).await?,
        Command::Logs { container, follow } => {
            containers::logs(&mut client, &container, follow).await?;
        }
        Command::Exec {
            container,
            timeout,
            command,
        } => return containers::exec(&mut client, &container, timeout, command).await,
        Command::Stop {
            containers,
            timeout,
        } => containers::stop(&mut client, &containers, timeout).await?,
        Command::Rm { containers, all } => {
            containers::remove(&mut client, &containers, all).await?;
        }
        Command::Image(ImageCommand::Ls) => images::list(&mut client).await?,
        Command::Image(ImageCommand::Pull { image }) => images::pull(&mut client, &image).await?,
        Command::Image(ImageCommand::Import { archive, name }) => {
            images::import(&mut client, &archive, name).await?;
        }
        Command::Image(ImageCommand::Rm { images }) => {
            images::remove(&mut client, &images).await?;
        }
        Command::Serve { .. } | Command::Config(_) | Command::Completions { .. } => {}
    }
    Ok(ExitCode::SUCCESS)
}

/// Writes to stdout at once.
fn print(text: &str) -> Result<(), CliError> {
    let mut out = std::io::stdout().lock();
    out.write_all(text.as_bytes())
        .and_then(|()| out.flush())
        .map_err(CliError::io("write to stdout"))
}
