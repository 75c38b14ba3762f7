//! What can be typed.

use std::path::PathBuf;

use clap::{Args, Parser, Subcommand};

/// A Kubernetes container runtime: one daemon that serves CRI v1 and builds pods itself.
#[derive(Debug, Parser)]
#[command(name = "berth", disable_version_flag = true)]
pub(super) struct Arguments {
    /// Socket of the daemon [default: $BERTH_ADDRESS, else /run/berth/berth.sock]
    #[arg(long, global = true, value_name = "SOCKET")]
    pub(super) address: Option<PathBuf>,
    #[command(subcommand)]
    pub(super) command: Command,
}

/// The commands.
#[derive(Debug, Subcommand)]
pub(super) enum Command {
    /// Run the daemon
    Serve {
        /// Configuration file [default: /etc/berth/config.toml where it exists]
        #[arg(long, value_name = "FILE")]
        config: Option<PathBuf>,
    },
    /// Run a command in a new pod of one container, and show what it prints
    Run(RunOptions),
    /// List containers
    Ps {
        /// Those that have ended, too
        #[arg(long, short)]
        all: bool,
    },
    /// Show what a container has printed
    Logs {
        /// Name or id
        container: String,
        /// Go on until the container ends
        #[arg(long, short)]
        follow: bool,
    },
    /// Run a command in a running container and show its output when it has ended
    Exec {
        /// Seconds after which the command is killed; 0: never
        #[arg(long, default_value_t = 0, value_name = "SECONDS")]
        timeout: u32,
        /// Name or id
        container: String,
        /// The command and its arguments
        #[arg(
            required = true,
            trailing_var_arg = true,
            allow_hyphen_values = true,
            value_name = "COMMAND"
        )]
        command: Vec<String>,
    },
    /// Ask containers to end, and kill them after a while
    Stop {
        /// Seconds until they are killed
        #[arg(long, short, default_value_t = 10, value_name = "SECONDS")]
        timeout: u32,
        /// Names or ids
        #[arg(required = true, value_name = "CONTAINER")]
        containers: Vec<String>,
    },
    /// Remove containers, and the pods that `berth run` made for them
    Rm {
        /// Every container that `berth run` made
        #[arg(long, conflicts_with = "containers")]
        all: bool,
        /// Names or ids
        #[arg(required_unless_present = "all", value_name = "CONTAINER")]
        containers: Vec<String>,
    },
    /// Images
    #[command(subcommand)]
    Image(ImageCommand),
    /// Show or check a configuration
    #[command(subcommand)]
    Config(ConfigCommand),
    /// Print the versions of this program and of the daemon
    Version,
    /// Print a completion script for a shell
    Completions {
        /// Which shell
        shell: clap_complete::Shell,
    },
}

/// Of `run`.
#[derive(Args, Debug)]
#[expect(
    clippy::struct_excessive_bools,
    reason = "each is a switch that is typed"
)]
pub(super) struct RunOptions {
    /// Remove everything when the command has ended
    #[arg(long, conflicts_with = "detach")]
    pub(super) rm: bool,
    /// Do not wait for the command
    #[arg(long, short)]
    pub(super) detach: bool,
    /// Name of pod and container [default: 12 digits]
    #[arg(long)]
    pub(super) name: Option<String>,
    /// Environment variable; without a value that of this process
    #[arg(long, short, value_name = "NAME[=VALUE]")]
    pub(super) env: Vec<String>,
    /// Mount of a path of this machine
    #[arg(long, short, value_name = "SOURCE:TARGET[:ro]")]
    pub(super) volume: Vec<String>,
    /// Port of this machine that leads to one of the pod
    #[arg(
        long = "publish",
        short = 'p',
        value_name = "[ADDRESS:]PORT:PORT[/PROTOCOL]"
    )]
    pub(super) publish: Vec<String>,
    /// The network of this machine instead of one for the pod
    #[arg(long)]
    pub(super) host_network: bool,
    /// Directory in which the command starts
    #[arg(long, short, value_name = "DIRECTORY")]
    pub(super) workdir: Option<String>,
    /// Program to run instead of the image's
    #[arg(long, value_name = "PROGRAM")]
    pub(super) entrypoint: Option<String>,
    /// Root filesystem without write access
    #[arg(long)]
    pub(super) read_only: bool,
    /// Reference or id of the image; it is pulled if it is not here
    pub(super) image: String,
    /// Arguments instead of the image's command
    #[arg(
        trailing_var_arg = true,
        allow_hyphen_values = true,
        value_name = "COMMAND"
    )]
    pub(super) command: Vec<String>,
}

/// Of `image`.
#[derive(Debug, Subcommand)]
pub(super) enum ImageCommand {
    /// List images
    Ls,
    /// Pull an image from its registry
    Pull {
        /// Reference
        image: String,
    },
    /// Take images from a docker-archive or oci-archive
    Import {
        /// File, or `-` for stdin
        archive: PathBuf,
        /// Name for an image that has none in the archive
        #[arg(long)]
        name: Option<String>,
    },
    /// Remove images with all their names
    Rm {
        /// References or ids
        #[arg(required = true, value_name = "IMAGE")]
        images: Vec<String>,
    },
}

/// Of `config`.
#[derive(Debug, Subcommand)]
pub(super) enum ConfigCommand {
    /// Print the default configuration with all its keys
    Default,
    /// Read a configuration and say what is wrong with it
    Check {
        /// Which file [default: /etc/berth/config.toml where it exists]
        file: Option<PathBuf>,
    },
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory as _;

    use super::*;

    #[test]
    fn the_commands_are_sound() {
        Arguments::command().debug_assert();
    }

    #[test]
    fn a_command_may_have_options_of_its_own() {
        let words = ["berth", "run", "--rm", "-e", "A=b", "img", "sh", "-c", "x"];
        let Command::Run(options) = Arguments::parse_from(words).command else {
            panic!("not run");
        };
        assert_eq!(options.command, ["sh", "-c", "x"]);
        let words = ["berth", "run", "img", "--", "--help"];
        let Command::Run(options) = Arguments::parse_from(words).command else {
            panic!("not run");
        };
        assert_eq!(options.command, ["--help"]);
    }
}
